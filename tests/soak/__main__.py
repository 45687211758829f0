"""python -m tests.soak --minutes 30: prints how requests ended and what is left, and fails where anything is wrong."""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil

from tests.faults.victim import Victim
from tests.soak import counted
from tests.soak.load import Load, settle

# What a caller may be told because a worker was killed: loads are not repeated, and generations twice at most.
TOLD = frozenset({"WORKER_LOST", "REQUEST_KILLS_WORKER"})
FAULTS = ("worker kill -9", "client kill -9")
# Seconds between two faults; a worker takes some to come up again.
PAUSES = (20.0, 60.0)
WARM_UP_SECONDS = 30.0
# Of memory and tensors: allocators keep some of what they had, and a worker that was started again has other caches.
MOST_GROWTH = 1.25
# Pools of threads grow up to their bounds when more goes on at once than ever before.
MORE_THREADS = 4


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--callers", type=int, default=4)
    parser.add_argument("--pause", type=float, default=0.5, help="mean seconds between two requests of a caller")
    parser.add_argument("--no-faults", action="store_true", help="kill nobody")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, Victim(Path(folder), worker=counted.NAME, results_ttl=3600) as victim:
        load = Load(victim.target, frozenset() if given.no_faults else TOLD, given.seed)
        load.warm_up(given.callers, WARM_UP_SECONDS)
        before = measure(victim)
        load.start(given.callers, given.pause)
        faults = hurt(victim, load, given.minutes * 60, None if given.no_faults else random.Random(given.seed))
        load.stop()
        after = measure(victim)
    print(f"{given.minutes:g} minutes, {given.callers} callers, {sum(load.ends.values()):,} requests; {faults}\n")
    print("| what | ended as | times |\n|---|---|---|")
    for name, count in sorted(load.ends.items()):
        what, _, end = name.partition(": ")
        print(f"| {what} | {end} | {count:,} |")
    print("\n| what is there | before | after |\n|---|---|---|")
    grown = []
    for name in before:
        print(f"| {name} | {before[name]:,} | {after[name]:,} |")
        limit = before[name] * MOST_GROWTH if name.endswith(("MiB", "tensors")) else before[name]
        limit += MORE_THREADS if name.endswith("threads") else 0
        if after[name] > limit:
            grown.append(name)
    for text in (*load.wrong[:50], *(f"{name} has grown" for name in grown)):
        print(f"WRONG: {text}")
    return 1 if load.wrong or grown else 0


def hurt(victim: Victim, load: Load, seconds: float, dice: random.Random | None) -> str:
    """Waits so long, and does faults meanwhile; returns what it did."""
    end, done = time.monotonic() + seconds, dict.fromkeys(FAULTS, 0)
    while (left := end - time.monotonic()) > 0:
        if dice is None:
            time.sleep(left)
            break
        time.sleep(min(dice.uniform(*PAUSES), left))
        fault = dice.choice(FAULTS)
        if fault == "client kill -9":
            caller = load.start_victim()
            time.sleep(dice.uniform(0, 3))
            caller.kill()
            caller.wait()
        else:
            with suppress(psutil.NoSuchProcess):
                for worker in victim.workers():
                    worker.kill()
        done[fault] += 1
    return ", ".join(f"{fault} {count} times" for fault, count in done.items() if count) or "no faults"


def measure(victim: Victim) -> dict[str, int]:
    """What daemon and worker have when nothing is under way."""
    with victim.client() as client:
        end = time.monotonic() + 120
        while any(worker.running_count or worker.waiting_count or not worker.pid for worker in client.workers()):
            assert time.monotonic() < end, "something still runs"
            time.sleep(0.5)
        for _ in range(3):
            settle(client)
        # Connections that ended are closed by and by.
        time.sleep(10)
        pipelines = len(client.pipelines())
    front_end, (worker,) = psutil.Process(victim.process.pid), victim.workers()
    counts = counted.ask(victim.state_dir, worker)
    found = {"pipelines": pipelines}
    for name, process in (("front-end", front_end), ("worker", worker)):
        found |= {
            f"{name}: resident MiB": process.memory_info().rss // 2**20,
            f"{name}: threads": process.num_threads(),
            f"{name}: file descriptors": process.num_fds(),
        }
    return found | {f"worker: {name.replace('_', ' ')}": count for name, count in counts.items()}


if __name__ == "__main__":
    sys.exit(main())
