"""Ours beside diffusers in one process and beside other servers: the same pictures, in turns, in one run.

    python -m tests.benchmarks.serving                     # every load
    python -m tests.benchmarks.serving "equal, 4 steps"    # one of them

Each load runs on all servers before the next round begins, so that what else the machine does meets all alike. One
compute thread a process. Figures are medians with quartiles over rounds, and ratios to the floor: diffusers in this
process under a lock.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests import checkpoints
from tests.benchmarks import servers, setting
from tests.benchmarks.asks import Ask, equal, mixed
from tests.benchmarks.servers import CallerLeftError, Server

FLOOR = "in-process, a lock"
SETTLE_SECONDS = 0.3

Measure = Callable[[Server], float]


@dataclass(frozen=True, slots=True)
class Load:
    """`measure` gives seconds, or pictures per second; `unit` says which."""

    name: str
    measure: Measure
    unit: str = "ms"
    rounds: int = 5
    small: bool = False


def latency(steps: int) -> Measure:
    return lambda server: setting.seconds(lambda: server.draw(Ask(steps)))


def throughput(asks: Sequence[Ask], concurrent: int) -> Measure:
    """A closed loop: so many callers, each with its next request as soon as it has a picture."""

    def measure(server: Server) -> float:
        with ThreadPoolExecutor(concurrent) as callers:
            return len(asks) / setting.seconds(lambda: list(callers.map(server.draw, asks)))

    return measure


def behind_long_ones(server: Server) -> float:
    """How long 4 steps take while three requests of 50 run: the first one, when they are well on their way."""
    with ThreadPoolExecutor(3) as callers:
        longs = [callers.submit(server.draw, Ask(50, seed=seed)) for seed in range(3)]
        time.sleep(SETTLE_SECONDS)
        seconds = setting.seconds(lambda: server.draw(Ask(4)))
        for one in longs:
            one.result()
    return seconds


def after_a_cancel(server: Server) -> float:
    """How long 4 steps take right after a caller of 50 has left."""
    with suppress(CallerLeftError):
        server.draw(Ask(50), timeout=SETTLE_SECONDS)
    return setting.seconds(lambda: server.draw(Ask(4)))


LOADS = (
    Load("one request, 4 steps", latency(4), rounds=25),
    Load("one request, 20 steps", latency(20), rounds=15),
    Load("equal, 4 steps, 1 caller", throughput(equal(12, 4), 1), "pictures/s", 3),
    Load("equal, 4 steps, 4 callers", throughput(equal(24, 4), 4), "pictures/s", 3),
    Load("equal, 4 steps, 16 callers", throughput(equal(64, 4), 16), "pictures/s", 5),
    Load("equal, 20 steps, 4 callers", throughput(equal(16, 20), 4), "pictures/s", 3),
    Load("equal, 20 steps, 16 callers", throughput(equal(32, 20), 16), "pictures/s", 3),
    Load("mixed, 16 callers", throughput(mixed(32), 16), "pictures/s", 3),
    Load("4 steps behind three of 50", behind_long_ones, rounds=5),
    Load("4 steps after a cancel", after_a_cancel, rounds=5),
    Load("small model, equal, 20 steps, 8 callers", throughput(equal(8, 20), 8), "pictures/s", 2, small=True),
    Load("small model, mixed, 12 callers", throughput(mixed(12), 12), "pictures/s", 2, small=True),
)
ONCE = "start, memory, kill -9"


def main(wanted: Sequence[str] = ()) -> None:
    known = [*(load.name for load in LOADS), ONCE]
    for name in wanted:
        if name not in known:
            sys.exit(f"there is no load {name!r}, only {', '.join(known)}")
    chosen = [load for load in LOADS if load.name in (wanted or known)]
    with tempfile.TemporaryDirectory() as folder:
        for small in (False, True):
            loads = [load for load in chosen if load.small == small]
            if loads:
                checkpoint = _checkpoint(Path(folder), small=small)
                with _started(checkpoint, Path(folder)) as running:
                    for load in loads:
                        _show(load, _rounds(load, running))
        if ONCE in (wanted or known):
            _once(_checkpoint(Path(folder), small=False), Path(folder))


def _checkpoint(folder: Path, *, small: bool) -> Path:
    target = folder / ("small" if small else "tiny")
    if not target.exists():
        # 7 and 90 ms for a call of two samples on the machine that this was written on.
        unet = {"block_out_channels": (256, 512), "layers_per_block": 2} if small else {}
        checkpoints.stable_diffusion(target, unet=unet)
    return target


@contextmanager
def _started(checkpoint: Path, folder: Path) -> Iterator[dict[str, Server]]:
    with ExitStack() as stack:
        running = {}
        for name in servers.present():
            state = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=folder)))
            running[name] = stack.enter_context(servers.start(name, checkpoint, state))
        yield running


def _rounds(load: Load, running: dict[str, Server]) -> dict[str, list[float]]:
    values: dict[str, list[float]] = {name: [] for name in running}
    # The first round warms up: new kinds of call are verified, batches seen, pools filled.
    for turn in range(load.rounds + 1):
        for name, server in running.items():
            value = load.measure(server)
            if turn:
                values[name].append(value)
    return values


def _show(load: Load, values: dict[str, list[float]]) -> None:
    print(f"\n{load.name}", flush=True)
    floor = statistics.median(values[FLOOR])
    for name, found in values.items():
        ratio = statistics.median(found) / floor
        print(f"  {name:22} {setting.spread(found, load.unit):38} x{ratio:.2f}", flush=True)


def _once(checkpoint: Path, folder: Path) -> None:
    """What a server does once: from nothing to the first picture, what it weighs, and how it gets over a death."""
    print(f"\n{ONCE}", flush=True)
    for name in servers.present():
        if name == FLOOR:
            continue
        began = time.perf_counter()
        with tempfile.TemporaryDirectory(dir=folder) as state, servers.start(name, checkpoint, Path(state)) as server:
            server.draw(Ask(4))
            first = time.perf_counter() - began
            time.sleep(2)
            processes = server.processes()
            memory = sum(process.memory_full_info().pss for process in processes)
            again = _back_after_a_death(server, processes)
        back = f"{again:.1f} s" if again is not None else f"not within {RECOVERY_SECONDS:.0f} s"
        print(f"  {name:22} first picture {first:5.1f} s, {memory / 2**20:6.0f} MiB, back {back}", flush=True)


RECOVERY_SECONDS = 60.0


def _back_after_a_death(server: Server, processes: list[psutil.Process]) -> float | None:
    """Seconds until a picture comes after kill -9 of the process that has the model: the one that weighs most."""
    began = time.perf_counter()
    max(processes, key=lambda process: process.memory_full_info().uss).kill()
    while (waited := time.perf_counter() - began) < RECOVERY_SECONDS:
        answered: list[bytes] = []
        # A thread of its own: some servers leave callers waiting for ever.
        thread = threading.Thread(target=_try, args=(server, answered), daemon=True)
        thread.start()
        thread.join(RECOVERY_SECONDS - waited)
        if answered:
            return time.perf_counter() - began
        time.sleep(servers.PAUSE)
    return None


def _try(server: Server, answered: list[bytes]) -> None:
    with suppress(Exception):
        answered.append(server.draw(Ask(4), timeout=10))


if __name__ == "__main__":
    main(sys.argv[1:])
