"""Many of everything at once: 2,000 handles, 500 watchers, 200 callers on two workers. Nothing may fail or pile up."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil
from denoised.aio import AsyncClient
from denoised.v1 import generation_service_pb2
from denoised.v1.pipeline_service_pb2 import WatchPipelinesResponse

from tests import checkpoints
from tests.benchmarks import setting
from tests.daemon import Daemon

HANDLES, WATCHERS, CALLERS, PICTURES = 2_000, 500, 200, 400
STEPS = 4
CHANNELS = 10


async def _watch(client: AsyncClient, seen: Counter[str], synced: asyncio.Semaphore) -> None:
    async for response in client.watch():
        seen[WatchPipelinesResponse.Change.Name(response.change)] += 1
        if response.change == WatchPipelinesResponse.CHANGE_SYNCED:
            synced.release()


async def _draw(client: AsyncClient, name: str, seed: int) -> float:
    request = generation_service_pb2.GenerateRequest(pipeline=name, prompt="red apple")
    request.sampling.num_inference_steps = STEPS
    request.sampling.seeds.append(seed)
    began = time.perf_counter()
    async for _ in client.generate(request):
        pass
    return time.perf_counter() - began


async def _run(daemon: Daemon, checkpoint: Path) -> None:
    front_end = psutil.Process(daemon.process.pid)
    clients = [AsyncClient(daemon.target, progress_bar=False) for _ in range(CHANNELS)]

    def weight() -> str:
        return f"front-end {front_end.memory_info().rss / 2**20:.0f} MiB"

    print(f"idle         {weight()}")
    source = await clients[0].load(checkpoint, task="text-to-image")
    began = time.perf_counter()
    names = [source.name]
    while len(names) < HANDLES:
        made = await asyncio.gather(*(client.derive(source, "image-to-image") for client in clients))
        names += [pipeline.name for pipeline in made]
    print(f"handles      {len(names):,} in {time.perf_counter() - began:.1f} s, {weight()}")
    seen, synced = Counter[str](), asyncio.Semaphore(0)
    watching = [
        asyncio.create_task(_watch(client, seen, synced)) for client in clients for _ in range(WATCHERS // CHANNELS)
    ]
    for _ in watching:
        await synced.acquire()
    print(f"watchers     {WATCHERS} see {seen['CHANGE_ADDED']:,} pipelines, {weight()}")
    gate = asyncio.Semaphore(CALLERS)

    async def call(seed: int) -> float:
        async with gate:
            return await _draw(clients[seed % CHANNELS], source.name, seed)

    times, peak = asyncio.gather(*(call(seed) for seed in range(PICTURES))), 0
    while not times.done():
        await asyncio.sleep(0.2)
        peak = max(peak, front_end.memory_info().rss)
    seconds = await times
    print(
        f"pictures     {PICTURES} for {CALLERS} callers, none failed: "
        f"{setting.spread(seconds)}, slowest {max(seconds):.1f} s"
    )
    print(f"             front-end at most {peak / 2**20:.0f} MiB, {seen['CHANGE_MODIFIED']:,} changes seen")
    for task in watching:
        task.cancel()
    results = await asyncio.gather(*watching, return_exceptions=True)
    failed = Counter(type(result).__name__ for result in results if not isinstance(result, asyncio.CancelledError))
    print(f"watchers     ended early: {dict(failed) or 'none'}")
    for client in clients:
        await client.close()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = checkpoints.stable_diffusion(Path(folder) / "sd")
        state = Path(folder) / "state"
        settings = {"DENOISED_MAX_WAITING": "1000"}
        with Daemon(state, "--workers", "2", allow=[checkpoint], threads=1, **settings) as daemon:
            asyncio.run(_run(daemon, checkpoint))


if __name__ == "__main__":
    main()
