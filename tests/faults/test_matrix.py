"""The fault matrix: each fault in each moment, what the client sees, and that nothing is lost.

Over toy workers where it is about the daemon, over real ones where it is about them. `make faults` prints the table
that docs/reliability.md has; every run of the tests tries two of the moments of some of the faults.
"""

from __future__ import annotations

import contextlib
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from denoised import Client, DenoisedError
from denoised.v1.generation_service_pb2 import GenerateRequest
from denoised_server.worker.sources import EMBEDDED

from tests.faults import IS_LONG, faulty
from tests.faults.proxy import Proxy, impatient
from tests.faults.victim import TOY, Victim
from tests.hub import Hub

EVERY_MOMENT = ("idle", "loading", "queued", "denoising", "decoding", "streaming")
MOMENTS = EVERY_MOMENT if IS_LONG else ("loading", "denoising")
WHOLE, LOADED = "whole result", "loaded"
LOCK_SECONDS = 5.0
SLOW_READER_SECONDS = 3.0


@dataclass(frozen=True)
class Stage:
    """What runs while something breaks: a pipeline "a" of `source`, and a load of `another`."""

    worker: str
    source: str
    another: str
    steps: int
    prompt: str


TOYS = Stage(TOY, "weights", "slow", steps=150, prompt="slowly")
REAL = Stage(faulty.NAME, "demo", "demo", steps=10, prompt="red apple")
SEEN_BY_NOBODY = "nothing left"


@dataclass(frozen=True)
class Fault:
    """Something that breaks, and by moment what the client may see of it other than a whole result.

    `heal` makes it whole again. `idle` says what is asked of the daemon after a fault while nothing ran.
    """

    hurt: Callable[[Victim], object]
    seen: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    stage: Stage = TOYS
    heal: Callable[[Victim], object] = lambda victim: None
    idle: str = "generate"
    is_slow: bool = False


def generate(client: Client, stage: Stage, prompt: str, seen: Callable[[str], object] = lambda event: None) -> str:
    """Runs a pipeline; "whole result" where each step and each output came once, else the reason of the error."""
    request = GenerateRequest(pipeline="pipelines/a", prompt=prompt)
    request.sampling.num_inference_steps = stage.steps
    if stage.worker != TOY:
        request.sampling.num_images_per_prompt = 2
    steps, outputs = [], []
    try:
        for event in client.generate(request, timeout=120):
            kind: str = event.WhichOneof("event") or ""
            if kind == "progress":
                steps.append(event.progress.completed_steps)
                kind = f"step {len(steps)}"
            elif kind == "output":
                outputs.append(event.output.index)
            seen(kind)
    except DenoisedError as error:
        return error.reason or type(error).__name__
    assert steps == list(range(1, stage.steps + 1))
    assert sorted(outputs) == ([0, 1] if prompt == stage.prompt else [0])
    return WHOLE


def load(client: Client, stage: Stage, seen: Callable[[str], object] = lambda event: None) -> str:
    try:
        client.load(stage.another, pipeline_id="new", task="image-to-image", on_progress=lambda _: seen("loading"))
    except DenoisedError as error:
        return error.reason or type(error).__name__
    return LOADED


def strike(client: Client, stage: Stage, moment: str, fault: Callable[[], object], idle: str) -> str:
    """Does the fault in that moment; returns what the client saw of what was under way."""
    struck = threading.Event()

    def once(found: str, wanted: str) -> None:
        if found == wanted and not struck.is_set():
            struck.set()
            fault()

    match moment:
        case "idle":
            fault()
            return load(client, stage) if idle == "load" else generate(client, stage, stage.prompt)
        case "loading":
            return load(client, stage, lambda found: once(found, "loading"))
        case "queued":
            hog = threading.Thread(target=generate, args=(client, stage, stage.prompt))
            hog.start()
            while not any(worker.running_count for worker in client.workers()):
                time.sleep(0.01)
            seen = generate(client, stage, stage.prompt, lambda found: once(found, "queued"))
            hog.join()
            return seen
    last = f"step {stage.steps}"
    wanted = {"denoising": f"step {stage.steps // 2}", "decoding": last, "streaming": "output"}[moment]
    return generate(client, stage, stage.prompt, lambda found: once(found, wanted))


@contextmanager
def locked(victim: Victim, seconds: float) -> Iterator[None]:
    with closing(sqlite3.connect(victim.state_dir / "journal.sqlite3", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        time.sleep(seconds)
        other.execute("ROLLBACK")


def hold_lock(victim: Victim) -> None:
    taken = threading.Event()

    def hold() -> None:
        with locked(victim, LOCK_SECONDS):
            taken.set()

    threading.Thread(target=hold).start()
    taken.wait()


def fill_disk(victim: Victim) -> None:
    """No file of the daemon's grows any more: its kernel refuses each write as it does on a full disk."""
    _limit(victim, 1)


def empty_disk(victim: Victim) -> None:
    _limit(victim, resource.RLIM_INFINITY)


def _limit(victim: Victim, size: int) -> None:
    _, hard = psutil.Process(victim.process.pid).rlimit(psutil.RLIMIT_FSIZE)
    psutil.Process(victim.process.pid).rlimit(psutil.RLIMIT_FSIZE, (size, hard))


def restart(victim: Victim, number: int) -> None:
    victim.process.send_signal(number)

    def again() -> None:
        victim.wait()
        victim.start()

    threading.Thread(target=again).start()


def signal_worker(victim: Victim, number: int) -> None:
    victim.workers()[0].send_signal(number)


FAILED_ALLOCATION: dict[str, str | tuple[str, ...]] = dict.fromkeys(EVERY_MOMENT, (WHOLE, "DEVICE_OUT_OF_MEMORY"))
FAILED_ALLOCATION["loading"] = LOADED
FAULTS: dict[str, Fault] = {
    "worker kill -9": Fault(lambda victim: signal_worker(victim, signal.SIGKILL), {"loading": "WORKER_LOST"}),
    "worker SIGSTOP": Fault(lambda victim: signal_worker(victim, signal.SIGSTOP), {"loading": "WORKER_LOST"}),
    "exception in a forward": Fault(
        lambda victim: signal_worker(victim, faulty.EXCEPTION),
        # Of two, the one that ran fails.
        {"idle": "INTERNAL", "loading": LOADED, "denoising": "INTERNAL", "decoding": "INTERNAL"},
        REAL,
        is_slow=True,
    ),
    "failed allocation": Fault(
        lambda victim: signal_worker(victim, faulty.ALLOCATION),
        FAILED_ALLOCATION,
        REAL,
        is_slow=True,
    ),
    "journal locked for 5 s": Fault(
        hold_lock,
        {"loading": "JOURNAL_UNAVAILABLE"},
        # What does not need the journal is over before it is free again.
        heal=lambda victim: time.sleep(LOCK_SECONDS),
    ),
    "disk full": Fault(fill_disk, {"loading": "JOURNAL_UNAVAILABLE"}, heal=empty_disk),
    "slow reader": Fault(lambda victim: time.sleep(SLOW_READER_SECONDS), {"loading": LOADED}),
    "daemon kill -9, started again": Fault(
        lambda victim: restart(victim, signal.SIGKILL),
        {"loading": LOADED, "idle": "DaemonUnreachableError"},
    ),
    "SIGTERM, started again": Fault(
        lambda victim: restart(victim, signal.SIGTERM),
        {"loading": LOADED, "idle": ("SHUTTING_DOWN", "DaemonUnreachableError")},
    ),
}


@pytest.mark.parametrize("name", [name for name, fault in FAULTS.items() if IS_LONG or not fault.is_slow])
def test_each_moment_of(name: str, tmp_path: Path) -> None:
    fault = FAULTS[name]
    # A real worker may be in its first calls for longer than a toy.
    settings: dict[str, Any] = {"heartbeat_timeout": 2 if fault.stage is TOYS else 30, "drain_grace": 20}
    with Victim(tmp_path, worker=fault.stage.worker, max_running=1, **settings) as victim, victim.client() as client:
        _try_each_moment(name, fault, victim, client)


@pytest.mark.skipif(not IS_LONG, reason="takes a worker with torch")
@pytest.mark.parametrize("how", ["truncated", "overwritten"])
def test_a_checkpoint_that_is_damaged_while_it_is_used(how: str, tmp_path: Path) -> None:
    whole, folder = EMBEDDED["demo"], tmp_path / "checkpoint"
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    shutil.copytree(whole, folder)

    def damage(victim: Victim) -> None:
        data = weights.read_bytes()
        weights.write_bytes(data[: len(data) // 2] if how == "truncated" else b"\xff" * 4096 + data[4096:])

    stage = Stage(faulty.NAME, "demo", str(folder), steps=REAL.steps, prompt=REAL.prompt)
    fault = Fault(
        damage,
        {"idle": "DAMAGED_WEIGHTS", "loading": ("DAMAGED_WEIGHTS", LOADED)},
        stage,
        heal=lambda victim: shutil.copytree(whole, folder, dirs_exist_ok=True),
        idle="load",
    )
    with (
        Victim(tmp_path / "state", worker=stage.worker, allow_dirs=tmp_path, max_running=1) as victim,
        victim.client() as client,
    ):
        _try_each_moment(f"checkpoint {how}", fault, victim, client)


@pytest.mark.skipif(not IS_LONG, reason="takes a worker with torch")
@pytest.mark.parametrize("how", ["hangs", "truncates", "answers 500"])
def test_a_hub_that(how: str, tmp_path: Path) -> None:
    with Hub() as hub:
        hub.add("owner/demo", EMBEDDED["demo"])
        stage = Stage(faulty.NAME, "demo", "owner/demo", steps=REAL.steps, prompt=REAL.prompt)
        cache = tmp_path / "cache"

        def hurt(victim: Victim) -> None:
            hub.hang_after = 65_536 if how == "hangs" else None
            hub.cut_after = 65_536 if how == "truncates" else None
            hub.failing = 500 if how == "answers 500" else None

        def heal(victim: Victim) -> None:
            hub.hang_after = hub.cut_after = hub.failing = None
            hub.released.set()
            hub.released = threading.Event()
            shutil.rmtree(cache, ignore_errors=True)

        failed = LOADED if how == "truncates" else "HUB_UNREACHABLE"
        fault = Fault(hurt, {"idle": failed, "loading": (failed, LOADED)}, stage, heal=heal, idle="load")
        variables = {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "0"}
        variables |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "3"}
        with (
            Victim(tmp_path / "state", worker=stage.worker, variables=variables, max_running=1) as victim,
            victim.client() as client,
        ):
            _try_each_moment(f"Hub {how}", fault, victim, client)


@pytest.mark.skipif(not IS_LONG, reason="waits for pings that are not answered")
def test_a_connection_that_is_half_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    impatient(monkeypatch)
    with Victim(tmp_path, max_running=1) as victim, Proxy(victim.target) as proxy:
        # What was not accepted yet is not sent again: it might run twice.
        fault = Fault(lambda _: proxy.silence(), {"loading": LOADED, "idle": "DaemonUnreachableError"})
        with Client(proxy.target, progress_bar=False, timeout=60.0) as client:
            _try_each_moment("half-open connection", fault, victim, client)


CLIENT = """
import sys
from pathlib import Path
from denoised import Client
from tests.faults import test_matrix as matrix
target, moment = sys.argv[1:]
def tell(): print("now", flush=True); input()
with Client(target, progress_bar=False) as client:
    matrix.strike(client, matrix.TOYS, moment, tell, "generate")
"""


def test_each_moment_of_a_client_that_is_killed(tmp_path: Path) -> None:
    """Its process is gone at once; what it asked for ends, and nothing of it is left."""
    row = []
    with Victim(tmp_path, max_running=1) as victim, victim.client() as client:
        client.load(TOYS.source, pipeline_id="a")
        for moment in MOMENTS:
            process = subprocess.Popen(
                [sys.executable, "-c", CLIENT, victim.target, moment], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            assert process.stdout
            assert process.stdin
            with process.stdout, process.stdin:
                assert process.stdout.readline() == b"now\n"
                process.kill()
                process.wait()
            end = time.monotonic() + 60
            while _is_left(client):
                assert time.monotonic() < end, f"{moment}: something is left"
                time.sleep(0.05)
            row.append(SEEN_BY_NOBODY)
            _is_well_again(client, TOYS)
    print(f"| client kill -9 | {' | '.join(row)} |")


def _is_left(client: Client) -> bool:
    (worker,) = client.workers()
    names = [pipe.name for pipe in client.pipelines()]
    return bool(worker.running_count or worker.waiting_count) or names != ["pipelines/a"]


def _try_each_moment(name: str, fault: Fault, victim: Victim, client: Client) -> None:
    row = []
    client.load(fault.stage.source, pipeline_id="a", task="text-to-image")
    for moment in MOMENTS:
        seen = strike(client, fault.stage, moment, lambda: fault.hurt(victim), fault.idle)
        row.append(f"{moment}: {seen}")
        allowed = fault.seen.get(moment, WHOLE)
        assert seen in (allowed if isinstance(allowed, tuple) else (allowed,)), row
        fault.heal(victim)
        _is_well_again(client, fault.stage)
    print(f"| {name} | {' | '.join(cell.partition(': ')[2] for cell in row)} |")


def _is_well_again(client: Client, stage: Stage) -> None:
    """Nothing is lost: the pipeline that was there works, and nothing half is."""
    end = time.monotonic() + 60
    while True:
        with contextlib.suppress(DenoisedError):
            names = {pipe.name for pipe in client.pipelines()}
            client.unload("pipelines/new") if "pipelines/new" in names else None
            if generate(client, stage, stage.prompt if stage.worker != TOY else "a cat") == WHOLE:
                break
        assert time.monotonic() < end
        time.sleep(0.1)
    found: Any = client.workers()[0]
    assert (found.running_count, found.waiting_count) == (0, 0)
    assert [pipe.name for pipe in client.pipelines()] == ["pipelines/a"]
