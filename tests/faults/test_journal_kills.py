"""The daemon is killed at random points, over and over: what it has acknowledged is there, whole, and nothing else."""

from __future__ import annotations

import random
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from denoised import Client, DenoisedError
from denoised.v1 import pipeline_service_pb2 as pb
from denoised.v1.generation_service_pb2 import GenerateRequest

from tests.faults import IS_LONG
from tests.faults.victim import Victim

ROUNDS = 300 if IS_LONG else 12
CALLERS = 3
MOST_HANDLES = 20


@dataclass(frozen=True)
class Promise:
    """What a caller was told."""

    repo_id: str
    ttl: int


class Ledger:
    """What callers were told, and what they had asked when the daemon died under them."""

    def __init__(self) -> None:
        self.promises: dict[str, Promise] = {}
        # Of these either the old or the new is right; None is "not there".
        self.open: dict[str, set[Promise | None]] = {}
        self.unloaded: set[str] = set()
        self.lock = threading.Lock()
        self.acknowledged = 0

    def check(self, found: dict[str, pb.Pipeline]) -> None:
        """Compares with what a fresh process has, and takes that over."""
        for name, promise in self.promises.items():
            if name not in self.open:
                assert name in found, f"{name} was acknowledged and is gone"
                assert seen(found[name]) == promise, f"{name} is not what was acknowledged"
        for name in found:
            assert name in self.promises or name in self.open, f"{name} was never acknowledged or is back"
        for name, possible in self.open.items():
            there = seen(found[name]) if name in found else None
            assert there in possible, f"{name} is half done: {there}, not one of {possible}"
        for pipeline in found.values():
            assert pipeline.state == pb.Pipeline.STATE_ACTIVE
            assert pipeline.parameters, f"{pipeline.name} lacks its parameters"
        self.promises = {name: seen(pipeline) for name, pipeline in found.items()}
        self.open.clear()


def seen(pipeline: pb.Pipeline) -> Promise:
    return Promise(pipeline.spec.repo_id, round(pipeline.expire_time.seconds - pipeline.last_use_time.seconds, -1))


def caller(client: Client, ledger: Ledger, dice: random.Random, number: int) -> None:
    """Asks for one thing after another until the daemon is dead."""
    counter = 0
    while True:
        counter += 1
        with ledger.lock:
            idle = [name for name in ledger.promises if name not in ledger.open]
            act = dice.choice(("load", "derive", "renew", "unload"))
            act = "unload" if len(idle) > MOST_HANDLES else "load" if not idle else act
            name = dice.choice(idle) if idle else ""
            new = f"pipelines/c{number}-{counter}-{dice.randrange(10**9)}"
            ttl = 10 * dice.randint(100, 1000)
            before = ledger.promises.get(name)
            promise = Promise(dice.choice(("cat", "dog")), ttl)
            if before and act != "load":
                promise = Promise(before.repo_id, ttl)
            touched = new if act in ("load", "derive") else name
            old = None if touched == new else before
            ledger.open[touched] = {old, None if act == "unload" else promise}
        try:
            identity = new.removeprefix("pipelines/")
            if act == "load":
                # For as long as it may take it is sent again to a daemon that is gone.
                client.load(promise.repo_id, pipeline_id=identity, ttl=ttl, timeout=2.0)
            elif act == "derive":
                client.derive(name, "inpainting", pipeline_id=identity, ttl=ttl)
            elif act == "renew":
                client.renew(name, ttl)
            else:
                client.unload(name)
        except DenoisedError:
            return
        with ledger.lock:
            del ledger.open[touched]
            ledger.acknowledged += 1
            if act == "unload":
                del ledger.promises[touched]
                ledger.unloaded.add(touched)
            else:
                ledger.promises[touched] = promise


def test_a_killed_daemon_has_everything_it_acknowledged_and_nothing_half(tmp_path: Path) -> None:
    dice, ledger = random.Random(1), Ledger()
    victim = Victim(tmp_path)
    victim.start()
    try:
        for _ in range(ROUNDS):
            with victim.client(timeout=20.0) as client:
                callers = [
                    threading.Thread(target=caller, args=(client, ledger, random.Random(dice.random()), number))
                    for number in range(CALLERS)
                ]
                for one in callers:
                    one.start()
                time.sleep(dice.random() * 0.4)
                victim.process.kill()
                for one in callers:
                    one.join(60)
                victim.wait()
            if dice.random() < 0.2:
                # Not even ready yet.
                victim.launch()
                time.sleep(dice.random() * 1.5)
                victim.kill()
            victim.start()
            with victim.client() as client:
                found = {pipe.name: pipe.info for pipe in client.pipelines()}
                ledger.check(found)
                for name in dice.sample(sorted(found), min(2, len(found))):
                    events = list(client.generate(GenerateRequest(pipeline=name, prompt="a cat")))
                    assert events[-1].HasField("summary")
    finally:
        victim.kill()
    print(f"{ROUNDS} kills, {ledger.acknowledged} acknowledged changes, {len(ledger.unloaded)} unloads")
    assert ledger.acknowledged > ROUNDS
