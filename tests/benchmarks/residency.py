"""Twelve pipelines of four families, with three times more weights than there is room for, asked for by a Zipf law.

What comes back to the device is what the daemon counted. Beside it, for the same requests in the same order: what a
least-recently-used cache of the same size would have fetched, and what nobody who evicts in whole bytes, and knows the
future, can stay below.
"""

from __future__ import annotations

import hashlib
import os
import random
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import denoised
import torch
from denoised.v1 import worker_service_pb2
from diffusers import DiffusionPipeline

from tests import checkpoints
from tests.benchmarks import setting
from tests.daemon import Daemon
from tests.parity.checkpoints import flux, pixart

VARIANTS = 3
ZIPF = 1.0
CLIENTS = 2
SECONDS = float(os.environ.get("DENOISED_BENCH_SECONDS", "150"))
SIZE: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "np"}
SWITCHES = 12
# More than the worker's own.
REST_SECONDS = 8.0
# Of those that take it: small pictures as they are.
AS_IT_IS = "use_resolution_binning"

Widen = Callable[[DiffusionPipeline], dict[str, Any]]
FAMILIES: Mapping[str, tuple[Callable[[Path], object], str, dict[str, object]]] = {
    "sd": (checkpoints.stable_diffusion, "unet", {"block_out_channels": (128, 256)}),
    "sdxl": (checkpoints.stable_diffusion_xl, "unet", {"block_out_channels": (128, 256)}),
    "flux": (flux.plain, "transformer", {"num_attention_heads": 32}),
    "pixart": (pixart.alpha, "transformer", {"num_attention_heads": 64, "cross_attention_dim": 512}),
}
TEXT_ENCODERS = {"intermediate_size": 32_768, "d_ff": 16_384}


def build(root: Path) -> list[Path]:
    """Each family as three checkpoints that differ in their denoisers; what reads texts is large too."""
    folders = []
    for name, (make, role, wide) in FAMILIES.items():
        make(root / f"{name}-tiny")
        pipeline: Any = DiffusionPipeline.from_pretrained(root / f"{name}-tiny")
        torch.manual_seed(0)
        for part, encoder in pipeline.components.items():
            if part.startswith("text_encoder"):
                for size, value in TEXT_ENCODERS.items():
                    if hasattr(encoder.config, size):
                        setattr(encoder.config, size, value)
                setattr(pipeline, part, type(encoder)(encoder.config))
        denoiser = getattr(pipeline, role)
        for variant in range(VARIANTS):
            torch.manual_seed(variant)
            setattr(pipeline, role, type(denoiser).from_config({**denoiser.config, **wide}))
            folders.append(root / f"{name}-{variant}")
            pipeline.save_pretrained(folders[-1])
    return folders


@dataclass(frozen=True)
class Fetched:
    """Of all uses of components, how many did not find theirs on the device, and the bytes of all and of those."""

    uses: int
    misses: int
    used_bytes: int
    missed_bytes: float

    def __str__(self) -> str:
        hits, byte_hits = 1 - self.misses / self.uses, 1 - self.missed_bytes / self.used_bytes
        return f"{hits:6.1%} of uses, {byte_hits:6.1%} of bytes"


def least_recently_used(trace: Sequence[str], sizes: Mapping[str, int], budget: int) -> Fetched:
    held: OrderedDict[str, None] = OrderedDict()
    misses, missed = 0, 0
    for digest in trace:
        if digest in held:
            held.move_to_end(digest)
            continue
        misses, missed = misses + 1, missed + sizes[digest]
        while sum(map(sizes.__getitem__, held)) + sizes[digest] > budget:
            held.popitem(last=False)
        held[digest] = None
    return Fetched(len(trace), misses, sum(map(sizes.__getitem__, trace)), missed)


def belady_by_bytes(trace: Sequence[str], sizes: Mapping[str, int], budget: int) -> float:
    """Bytes that have to be fetched whatever one does: what is needed latest leaves first, byte by byte."""
    held = dict.fromkeys(sizes, 0.0)
    following: dict[str, int] = {}
    after = [len(trace)] * len(trace)
    for place in reversed(range(len(trace))):
        after[place] = following.get(trace[place], len(trace))
        following[trace[place]] = place
    missed = 0.0
    until = dict.fromkeys(sizes, len(trace))
    for place, digest in enumerate(trace):
        missing = sizes[digest] - held[digest]
        missed += missing
        held[digest] = sizes[digest]
        until[digest] = after[place]
        over = sum(held.values()) - budget
        for other in sorted((other for other in held if other != digest), key=until.__getitem__, reverse=True):
            if over <= 0:
                break
            leaving = min(over, held[other])
            held[other] -= leaving
            over -= leaving
    return missed


class Load:
    """Callers that ask for pipelines by a Zipf law until the time is over, and the order in which they did."""

    def __init__(self, pipes: Sequence[denoised.Pipeline], seed: int) -> None:
        self._pipes, self._dice = pipes, random.Random(seed)
        ranks = list(range(len(pipes)))
        self._dice.shuffle(ranks)
        self._weights = [1 / (rank + 1) ** ZIPF for rank in ranks]
        self._lock = threading.Lock()
        self.order: list[int] = []
        self.seconds: list[float] = []

    def run(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        with ThreadPoolExecutor(CLIENTS) as callers:
            for caller in [callers.submit(self._call, end) for _ in range(CLIENTS)]:
                caller.result()

    def _call(self, end: float) -> None:
        while time.monotonic() < end:
            with self._lock:
                index = self._dice.choices(range(len(self._pipes)), self._weights)[0]
                self.order.append(index)
                seed = len(self.order)
            self.seconds.append(setting.seconds(lambda: draw(self._pipes[index], seed)))  # noqa: B023


@contextmanager
def _daemon(budget: int, folder: Path, host: int = 0) -> Iterator[Daemon]:
    variables: dict[str, Any] = {"DENOISED_MEMORY_BUDGET": str(budget), "DENOISED_HOST_MEMORY": str(host)}
    with tempfile.TemporaryDirectory() as state, Daemon(Path(state), allow=[folder], **variables) as daemon:
        yield daemon


def _arrivals(daemon: Daemon) -> dict[str, tuple[int, float, float]]:
    """By tier: how many components came back, their bytes, and the seconds that it took."""
    found = {}
    for tier in ("host", "disk"):
        labels = {"tier": tier}
        found[tier] = (
            int(daemon.metric_of("denoised_arrival_seconds_count", **labels)),
            daemon.metric_of("denoised_arrived_bytes_total", **labels),
            daemon.metric_of("denoised_arrival_seconds_sum", **labels),
        )
    return found


def draw(pipe: denoised.Pipeline, seed: int = 0) -> None:
    takes = {parameter.name for parameter in pipe.info.parameters}
    more: dict[str, Any] = {AS_IT_IS: False} if AS_IT_IS in takes else {}
    pipe("red apple", seed=seed, **SIZE, **more)


def _at_rest(daemon: Daemon, client: denoised.Client) -> tuple[worker_service_pb2.DeviceMemory, int]:
    """What the worker says of its memory, and the system of its process, once it has given back what it freed."""
    time.sleep(REST_SECONDS)
    return client.workers()[0].memory, sum(int(worker.memory_info().rss) for worker in daemon.workers())


def _mebibytes(size: float) -> str:
    return f"{size / 2**20:.1f} MiB"


def _run(root: Path, folders: Sequence[Path], budget: int) -> None:
    with _daemon(budget, root) as daemon, daemon.client(timeout=300.0) as client:
        # What libraries prepare for the first run of each family is no weights of ours.
        for folder in folders[::VARIANTS]:
            with client.load(folder, task="text-to-image") as warm:
                draw(warm)
        _, start = _at_rest(daemon, client)
        pipes = [client.load(folder, task="text-to-image") for folder in folders]
        parts = [{part.digest: part.weight_bytes for part in pipe.info.components if part.digest} for pipe in pipes]
        sizes = {digest: size for each in parts for digest, size in each.items()}
        told = sum(sum(each.values()) for each in parts)
        print(
            f"weights      {len(pipes)} pipelines, {sum(sizes.values()) / 2**20:.0f} MiB in {len(sizes)} components "
            f"({told / 2**20:.0f} MiB if nothing were shared), budget {budget / 2**20:.0f} MiB"
        )
        before, load = _arrivals(daemon), Load(pipes, seed=1)
        load.run(SECONDS)
        after = _arrivals(daemon)
        print(f"requests     {len(load.seconds)} in {SECONDS:.0f} s, no failure; each {setting.spread(load.seconds)}")
        trace = [digest for index in load.order for digest in parts[index]]
        used = sum(map(sizes.__getitem__, trace))
        count = sum(after[tier][0] - before[tier][0] for tier in after)
        fetched = sum(after[tier][1] - before[tier][1] for tier in after)
        print(f"hits         {Fetched(len(trace), count, used, fetched)}")
        print(f"  LRU        {least_recently_used(trace, sizes, budget)}")
        print(
            f"  bound      {'':>16} {1 - belady_by_bytes(trace, sizes, budget) / used:6.1%} of bytes (Belady by bytes)"
        )
        full, resident = _at_rest(daemon, client)
        assert full.weight_bytes <= full.budget_bytes
        # Handles stay, weights leave: what the process has less is what weights took.
        for pipe in pipes:
            pipe.renew(keep_alive=0)
        empty, others = _at_rest(daemon, client)
        booked, measured = full.weight_bytes - empty.weight_bytes, resident - others
        print(
            f"accounted    {_mebibytes(booked)}, measured {_mebibytes(measured)} ({measured / booked - 1:+.1%}); "
            f"beside weights {_mebibytes((others - start) / len(pipes))} for each pipeline; "
            f"unreclaimed {full.unreclaimed_bytes}"
        )
        for pipe in pipes:
            pipe.unload()
        left, end = _at_rest(daemon, client)
        print(f"unloaded     {_mebibytes(end)} of {_mebibytes(start)} at the start ({end / start - 1:+.1%})")
        assert left.weight_bytes == 0


def _switch(root: Path, folders: Sequence[Path], tier: str, host: int) -> None:
    """Two pipelines that share nothing and have room for one, in turns: each call has to bring its own back."""
    first, second = folders[0], folders[2 * VARIANTS]
    weights = [sum(path.stat().st_size for path in each.rglob("*.safetensors")) for each in (first, second)]
    budget = int(1.05 * max(weights))
    with _daemon(budget, root, host) as daemon, daemon.client(timeout=300.0) as client:
        pipes = [client.load(folder, task="text-to-image") for folder in (first, second)]
        stays = []
        for pipe in pipes:
            draw(pipe)
            stays += [setting.seconds(lambda: draw(pipe)) for _ in range(SWITCHES // 2)]  # noqa: B023
        before = _arrivals(daemon)
        moves = [setting.seconds(lambda: draw(pipe)) for pipe in pipes * (SWITCHES // 2)]  # noqa: B023
        after = _arrivals(daemon)
        counts = {name: after[name][0] - before[name][0] for name in after}
        size, seconds = (after[tier][index] - before[tier][index] for index in (1, 2))
        mebibytes, count = size / 2**20, max(counts[tier], 1)
        print(
            f"from {tier}    {setting.spread(moves)} a request, {setting.spread(stays)} without a switch; {count} "
            f"components of {mebibytes / count:.0f} MiB in {1e3 * seconds / count:.1f} ms each"
        )


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        folders = build(root)
        sizes = {path.resolve(): path.stat().st_size for each in folders for path in each.rglob("*.safetensors")}
        unique = _unique_bytes(sizes)
        _run(root, folders, unique // 3)
        for tier, host in (("disk", 0), ("host", 2**30)):
            _switch(root, folders, tier, host)


def _unique_bytes(sizes: Mapping[Path, int]) -> int:
    """What is the same in several checkpoints counts once."""
    found = {hashlib.sha256(path.read_bytes()).digest(): size for path, size in sizes.items()}
    return sum(found.values())


if __name__ == "__main__":
    main()
