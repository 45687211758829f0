"""What a daemon takes while nobody asks anything of it: the front-end's memory and time."""

from __future__ import annotations

import time

import psutil

from tests.benchmarks import setting

SETTLE_SECONDS, SECONDS = 3.0, 20.0


def main() -> None:
    with setting.daemon() as daemon, daemon.client() as client:
        pipe = client.load("demo", task="text-to-image")
        pipe("red apple", num_inference_steps=2)
        front = psutil.Process(daemon.process.pid)
        (worker,) = daemon.workers()
        time.sleep(SETTLE_SECONDS)
        before = [sum(process.cpu_times()[:2]) for process in (front, worker)]
        time.sleep(SECONDS)
        after = [sum(process.cpu_times()[:2]) for process in (front, worker)]
        for name, process, start, end in zip(("front-end", "worker"), (front, worker), before, after, strict=True):
            memory = process.memory_info().rss / 2**20
            print(f"{name:10} {memory:6.0f} MiB, {(end - start) / SECONDS:.2%} of a core")


if __name__ == "__main__":
    main()
