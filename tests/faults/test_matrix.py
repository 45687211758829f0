"""The fault matrix: each fault in each moment, what the client sees, and that nothing is lost.

Over toy workers, since it is about the daemon. `make faults` prints the table that docs/reliability.md has; every run
of the tests tries two of the moments.
"""

from __future__ import annotations

import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from denoised import Client, DenoisedError
from denoised.v1.generation_service_pb2 import GenerateRequest

from tests.faults import IS_LONG
from tests.faults.victim import Victim

EVERY_MOMENT = ("idle", "loading", "queued", "denoising", "decoding", "streaming")
MOMENTS = EVERY_MOMENT if IS_LONG else ("loading", "denoising")
STEPS = 150
WHOLE = "whole result"
LOCK_SECONDS = 5.0


def generate(client: Client, prompt: str = "slowly", seen: Callable[[str], object] = lambda event: None) -> str:
    """Runs a pipeline; "whole result" where each step and each output came once, else the reason of the error."""
    request = GenerateRequest(pipeline="pipelines/a", prompt=prompt)
    request.sampling.num_inference_steps = STEPS
    steps, outputs = [], []
    try:
        for event in client.generate(request, timeout=60):
            kind: str = event.WhichOneof("event") or ""
            if kind == "progress":
                steps.append(event.progress.completed_steps)
                kind = f"step {len(steps)}"
            elif kind == "output":
                outputs.append(event.output.index)
            seen(kind)
    except DenoisedError as error:
        return error.reason or type(error).__name__
    assert steps == list(range(1, STEPS + 1))
    assert sorted(outputs) == ([0, 1] if prompt == "slowly" else [0])
    return WHOLE


def load(client: Client) -> str:
    try:
        client.load("slow", pipeline_id="new")
    except DenoisedError as error:
        return error.reason or type(error).__name__
    return "loaded"


def strike(client: Client, moment: str, fault: Callable[[], None]) -> str:
    """Does the fault in that moment; returns what the client saw of what was under way."""
    struck = threading.Event()

    def once(found: str, wanted: str) -> None:
        if found == wanted and not struck.is_set():
            struck.set()
            fault()

    match moment:
        case "idle":
            fault()
            return generate(client)
        case "loading":
            threading.Timer(0.6, fault).start()
            return load(client)
        case "queued":
            hog = threading.Thread(target=generate, args=(client,))
            hog.start()
            while not any(worker.running_count for worker in client.workers()):
                time.sleep(0.01)
            seen = generate(client, "a cat", lambda found: once(found, "queued"))
            hog.join()
            return seen
    wanted = {"denoising": "step 75", "decoding": f"step {STEPS}", "streaming": "output"}[moment]
    return generate(client, seen=lambda found: once(found, wanted))


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


def restart(victim: Victim, number: int) -> None:
    victim.process.send_signal(number)

    def again() -> None:
        victim.wait()
        victim.start()

    threading.Thread(target=again).start()


def signal_worker(victim: Victim, number: int) -> None:
    victim.workers()[0].send_signal(number)


FAULTS: dict[str, tuple[Callable[[Victim], None], dict[str, str]]] = {
    "worker kill -9": (lambda victim: signal_worker(victim, signal.SIGKILL), {"loading": "WORKER_LOST"}),
    "worker SIGSTOP": (lambda victim: signal_worker(victim, signal.SIGSTOP), {"loading": "WORKER_LOST"}),
    "journal locked": (hold_lock, {"loading": "JOURNAL_UNAVAILABLE"}),
    "daemon kill -9": (
        lambda victim: restart(victim, signal.SIGKILL),
        {"loading": "DaemonUnreachableError", "idle": "DaemonUnreachableError"},
    ),
    "SIGTERM": (
        lambda victim: restart(victim, signal.SIGTERM),
        {"loading": "SHUTTING_DOWN", "idle": "SHUTTING_DOWN DaemonUnreachableError"},
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_moment_of(fault: str, tmp_path: Path) -> None:
    hurt, exceptions = FAULTS[fault]
    row = []
    with Victim(tmp_path, heartbeat_timeout=2, max_running=1, drain_grace=20) as victim, victim.client() as client:
        client.load("weights", pipeline_id="a")
        for moment in MOMENTS:
            seen = strike(client, moment, lambda: hurt(victim))
            row.append(f"{moment}: {seen}")
            assert seen in exceptions.get(moment, WHOLE), row
            if hurt is hold_lock:
                # What does not need the journal is over before it is free again.
                time.sleep(LOCK_SECONDS)
            _is_well_again(victim, client)
    print(f"| {fault} | {' | '.join(cell.partition(': ')[2] for cell in row)} |")


def _is_well_again(victim: Victim, client: Client) -> None:
    """Nothing is lost: the pipeline that was there works, and nothing half is."""
    end = time.monotonic() + 60
    while True:
        try:
            names = {pipe.name for pipe in client.pipelines()}
            client.unload("pipelines/new") if "pipelines/new" in names else None
            if generate(client, "a cat") == WHOLE:
                break
        except DenoisedError:
            assert time.monotonic() < end
        time.sleep(0.1)
    found: Any = client.workers()[0]
    assert (found.running_count, found.waiting_count) == (0, 0)
    assert [pipe.name for pipe in client.pipelines()] == ["pipelines/a"]
