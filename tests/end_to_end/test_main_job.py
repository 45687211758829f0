"""The main job, as users see it: a real daemon in a process, real sockets, real signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import denoised
import numpy as np
import psutil
import pytest
from denoised import errors
from denoised.v1 import pipeline_service_pb2
from denoised.v1.generation_service_pb2 import GenerateRequest
from PIL import Image

from tests.daemon import Daemon

SIZE: dict[str, Any] = {"height": 64, "width": 64}
PICTURE = Image.new("RGB", (64, 64), (200, 80, 20))
MASK = Image.new("L", (64, 64), 255)


@pytest.fixture
def own_daemon(tmp_path: Path, checkpoint_dir: Path) -> Iterator[Daemon]:
    with Daemon(tmp_path / "state", allow=[checkpoint_dir]) as running:
        yield running


@pytest.fixture
def client(daemon: Daemon) -> Iterator[denoised.Client]:
    with daemon.client() as client:
        yield client


@pytest.fixture
def pipe(client: denoised.Client, sd_checkpoint: Path) -> Iterator[denoised.Pipeline]:
    with denoised.AutoPipelineForText2Image.from_pretrained(sd_checkpoint, client=client) as pipe:
        yield pipe


def wait_until(true: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def test_deriving_takes_no_bytes(daemon: Daemon, pipe: denoised.Pipeline, client: denoised.Client) -> None:
    (worker,) = client.workers()
    process = psutil.Process(worker.pid)
    derived = [
        auto.from_pipe(pipe)
        for auto in (denoised.AutoPipelineForImage2Image, denoised.AutoPipelineForInpainting)
        for _ in range(5)
    ]
    before = process.memory_info().rss
    derived += [client.derive(pipe, "inpainting") for _ in range(10)]
    (after,) = client.workers()
    assert after.memory.weight_bytes == worker.memory.weight_bytes
    assert process.memory_info().rss - before < 2_000_000
    for each in derived:
        assert each.refresh().memory.exclusive_bytes == 0
        assert each.unload() == 0


def test_unloading_gives_the_memory_back(
    own_daemon: Daemon, tmp_path_factory: pytest.TempPathFactory, checkpoint_dir: Path
) -> None:
    from tests import checkpoints

    folder = checkpoints.stable_diffusion(checkpoint_dir / "wide", unet={"block_out_channels": (256, 512)})
    with own_daemon.client() as client:
        (process,) = own_daemon.workers()
        # The first load brings in code that stays.
        denoised.AutoPipelineForText2Image.from_pretrained(folder, client=client).unload()
        before = process.memory_info().rss
        pipe = denoised.AutoPipelineForText2Image.from_pretrained(folder, client=client)
        held = sum(component.weight_bytes for component in pipe.components.values())
        loaded = process.memory_info().rss - before
        assert held > 100_000_000
        assert 0.8 * held < loaded < 1.2 * held, "accounting and process agree"
        assert pipe.unload() == held
        wait_until(lambda: process.memory_info().rss - before < 0.1 * held)
        (worker,) = client.workers()
        assert worker.memory.weight_bytes == 0


def test_concurrent_tasks_are_really_joined(daemon: Daemon, pipe: denoised.Pipeline) -> None:
    image_to_image = denoised.AutoPipelineForImage2Image.from_pipe(pipe)
    inpainting = denoised.AutoPipelineForInpainting.from_pipe(pipe)
    before = daemon.metrics()
    requests = [
        lambda: pipe("a cat", num_inference_steps=20, **SIZE),
        lambda: image_to_image("a dog", image=PICTURE, num_inference_steps=25),
        lambda: inpainting("a cow", image=PICTURE, mask_image=MASK, num_inference_steps=20, **SIZE),
    ]
    with ThreadPoolExecutor(6) as threads:
        results = list(threads.map(lambda request: request(), requests * 2))
    assert all(result.images[0].size == (64, 64) for result in results)

    def grown(name: str) -> float:
        return sum(
            value - before.get(key, 0) for key, value in daemon.metrics().items() if key.partition("{")[0] == name
        )

    # The worker reports once a second.
    wait_until(lambda: grown("denoised_batch_size_sum") >= sum(result.timings.calls for result in results))
    assert grown("denoised_batch_size_sum") / grown("denoised_batch_size_count") > 1.5
    image_to_image.unload()
    inpainting.unload()


def test_a_caller_that_leaves_stops_the_work_within_a_step(
    daemon: Daemon, client: denoised.Client, pipe: denoised.Pipeline
) -> None:
    steps: list[int] = []

    def calls() -> int:
        return client.workers()[0].engine.call_count

    before = calls()

    def leave(pipe: object, step: int, timestep: object, tensors: object) -> dict[str, Any]:
        steps.append(step)
        if step == 3:
            raise KeyError("enough")
        return {}

    with pytest.raises(KeyError):
        pipe("a cat", num_inference_steps=900, callback_on_step_end=leave, **SIZE)
    wait_until(lambda: client.workers()[0].running_count == 0)
    time.sleep(1.1)  # the worker reports once a second
    stopped = calls()
    assert stopped - before < 900
    time.sleep(1.1)
    assert calls() == stopped
    assert len(steps) == 4


def test_a_deadline_stops_the_work(client: denoised.Client, pipe: denoised.Pipeline) -> None:
    start = time.monotonic()
    with pytest.raises(errors.DeadlineExceededError):
        pipe("a cat", num_inference_steps=900, timeout=0.5, **SIZE)
    assert time.monotonic() - start < 2
    wait_until(lambda: client.workers()[0].running_count == 0)
    assert pipe("a cat", num_inference_steps=2, **SIZE).images


def test_unloading_by_force_ends_what_runs(client: denoised.Client, sd_checkpoint: Path) -> None:
    pipe = denoised.AutoPipelineForText2Image.from_pretrained(sd_checkpoint, client=client)
    running, started = [], threading.Event()

    def run() -> None:
        try:
            pipe(
                "a cat",
                num_inference_steps=900,
                callback_on_step_end=lambda *_: started.set() or {},  # type: ignore[func-returns-value]
                **SIZE,
            )
        except denoised.DenoisedError as error:
            running.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    assert started.wait(30)
    pipe.unload(force=True)
    thread.join(10)
    assert [type(error) for error in running] == [errors.PipelineUnloadedError]
    with pytest.raises(errors.PipelineNotFoundError):
        pipe("a cat")
    pipe.unload()


def test_a_crash_loses_no_handle(own_daemon: Daemon, sd_checkpoint: Path) -> None:
    with own_daemon.client() as client:
        pipe = denoised.AutoPipelineForText2Image.from_pretrained(sd_checkpoint, client=client)
        derived = denoised.AutoPipelineForInpainting.from_pipe(pipe)
        arguments: dict[str, Any] = {
            "image": PICTURE,
            "mask_image": MASK,
            "num_inference_steps": 4,
            "seed": 1,
            "batching": "forbid",
        }
        before = np.asarray(derived("a cat", **arguments, **SIZE).images[0])
        (process,) = own_daemon.workers()
        request = GenerateRequest(pipeline=pipe.name, prompt="a")
        request.sampling.num_inference_steps = 60
        steps = []
        for event in client.generate(request):
            if event.HasField("progress"):
                steps.append(event.progress.completed_steps)
                if len(steps) == 20:
                    process.send_signal(signal.SIGKILL)
        assert steps == list(range(1, 61)), "one stream, each step once"
        assert event.summary.replay_count == 1
        lost = client.pipeline(derived.name).info
        assert lost.residency == pipeline_service_pb2.RESIDENCY_DISK
        after = np.asarray(derived("a cat", **arguments, **SIZE).images[0])
        np.testing.assert_array_equal(after, before)
        (worker,) = client.workers()
        assert worker.restart_count == 1
        assert worker.pid != process.pid
        assert own_daemon.metric("denoised_worker_restarts_total") == 1
        assert pipe("a", num_inference_steps=2, **SIZE).images


def test_loads_of_one_spec_at_once_are_one_load(own_daemon: Daemon, sd_checkpoint: Path) -> None:
    with own_daemon.client() as client, ThreadPoolExecutor(6) as threads:
        pipes = list(
            threads.map(
                lambda _: denoised.AutoPipelineForText2Image.from_pretrained(sd_checkpoint, client=client), range(6)
            )
        )
        assert len({pipe.name for pipe in pipes}) == 6
        (worker,) = client.workers()
        assert worker.memory.weight_bytes == pipes[0].refresh().memory.shared_bytes
        for pipe in pipes[1:]:
            pipe.unload()
        assert pipes[0]("a cat", num_inference_steps=2, **SIZE).images


def test_handles_by_choice_request_and_lease(client: denoised.Client, sd_checkpoint: Path) -> None:
    first = client.load(sd_checkpoint, task="text-to-image", pipeline_id="chosen", request_id="once", ttl=60)
    assert first.name == "pipelines/chosen"
    assert client.load(sd_checkpoint, task="text-to-image", pipeline_id="chosen", request_id="once").name == first.name
    with pytest.raises(errors.PipelineExistsError):
        client.load(sd_checkpoint, task="inpainting", pipeline_id="chosen")
    before = first.info.expire_time.ToSeconds()
    assert first.renew("1h").info.expire_time.ToSeconds() > before + 3000
    assert first.name in {pipe.name for pipe in client.pipelines()}
    first.unload()
    brief = client.load(sd_checkpoint, task="text-to-image", ttl=1)
    wait_until(lambda: brief.name not in {pipe.name for pipe in client.pipelines()})
    with pytest.raises(errors.PipelineNotFoundError):
        brief("a cat")


def test_watching_tells_what_changes(client: denoised.Client, sd_checkpoint: Path) -> None:
    events, watching = [], threading.Event()

    def watch() -> None:
        for event in client.watch():
            events.append((event.change, event.pipeline.name))
            if event.change == pipeline_service_pb2.WatchPipelinesResponse.CHANGE_SYNCED:
                watching.set()
            if event.change == pipeline_service_pb2.WatchPipelinesResponse.CHANGE_REMOVED:
                return

    thread = threading.Thread(target=watch)
    thread.start()
    assert watching.wait(10)
    pipe = client.load(sd_checkpoint, task="text-to-image")
    pipe.unload()
    thread.join(10)
    kinds = [change for change, name in events if name == pipe.name]
    assert kinds[0] == pipeline_service_pb2.WatchPipelinesResponse.CHANGE_ADDED
    assert kinds[-1] == pipeline_service_pb2.WatchPipelinesResponse.CHANGE_REMOVED


def test_a_full_queue_refuses_and_says_when_to_try_again(
    tmp_path: Path, checkpoint_dir: Path, sd_checkpoint: Path
) -> None:
    config = tmp_path / "denoised.toml"
    config.write_text("max_running = 1\nmax_waiting = 1\n")
    with (
        Daemon(tmp_path / "state", "--config", str(config), allow=[checkpoint_dir]) as running,
        running.client() as client,
        ThreadPoolExecutor(4) as threads,
    ):
        pipe = denoised.AutoPipelineForText2Image.from_pretrained(sd_checkpoint, client=client)

        def run(_: int) -> object:
            try:
                return pipe("a cat", num_inference_steps=60, **SIZE)
            except errors.QueueFullError as error:
                return error

        results = list(threads.map(run, range(4)))
        refused = [each for each in results if isinstance(each, errors.QueueFullError)]
        assert len(refused) == 2
        assert all(error.retry_after and error.retry_after > 0 for error in refused)


def test_two_workers_each_take_their_share(
    tmp_path: Path, checkpoint_dir: Path, sd_checkpoint: Path, sdxl_checkpoint: Path
) -> None:
    with Daemon(tmp_path / "state", "--workers", "2", allow=[checkpoint_dir]) as running, running.client() as client:
        first = denoised.AutoPipelineForText2Image.from_pretrained(sd_checkpoint, client=client)
        second = denoised.AutoPipelineForText2Image.from_pretrained(sdxl_checkpoint, client=client)
        assert first.info.worker != second.info.worker
        assert denoised.AutoPipelineForImage2Image.from_pipe(second).info.worker == second.info.worker
        for pipe in (first, second):
            assert pipe("a cat", num_inference_steps=2, **SIZE).images
        killed = {worker.name: worker.pid for worker in client.workers()}[first.info.worker]
        os.kill(killed, signal.SIGKILL)
        assert second("a cat", num_inference_steps=2, **SIZE).images


def test_sigterm_drains(tmp_path: Path, checkpoint_dir: Path, sd_checkpoint: Path) -> None:
    running = Daemon(tmp_path / "state", allow=[checkpoint_dir])
    with running.client() as client:
        pipe = denoised.AutoPipelineForText2Image.from_pretrained(sd_checkpoint, client=client)
        started, result = threading.Event(), []

        def run() -> None:
            result.append(
                pipe("a cat", num_inference_steps=60, callback_on_step_end=lambda *_: started.set() or {}, **SIZE)  # type: ignore[func-returns-value]
            )

        thread = threading.Thread(target=run)
        thread.start()
        assert started.wait(30)
        workers = running.workers()
        running.process.send_signal(signal.SIGTERM)

        def keep_asking() -> None:
            while True:
                pipe("a dog", num_inference_steps=1, **SIZE)

        with pytest.raises((errors.ShuttingDownError, errors.DaemonUnreachableError)):
            keep_asking()
        thread.join(60)
        assert result, "what ran was finished"
        assert running.process.wait(30) == 0
        assert not any(worker.is_running() for worker in workers)


def test_a_second_daemon_on_the_port_says_so(daemon: Daemon, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "denoised", "serve", "--state-dir", str(tmp_path), "--address", daemon.target]
    second = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert second.returncode == 1
    assert daemon.target.rpartition(":")[2] in second.stderr
    assert "Traceback" not in second.stderr
    assert len(second.stderr.strip().splitlines()) == 1


def test_the_command_line_does_the_main_job(daemon: Daemon, sd_checkpoint: Path, tmp_path: Path) -> None:
    def run(*arguments: str, code: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "denoised", *arguments, "--target", daemon.target],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == code, done.stderr
        return done.stdout

    name = run("load", str(sd_checkpoint), "--task", "text-to-image").strip()
    derived = run("derive", name, "--task", "image-to-image").strip()
    image, second = tmp_path / "image.png", tmp_path / "second.png"
    run("generate", name, "--prompt", "a cat", "--steps", "2", "--width", "64", "--height", "64", "-o", str(image))
    run("generate", derived, "--prompt", "a dog", "--image", str(image), "--steps", "4", "-o", str(second))
    with Image.open(second) as made:
        assert made.size == (64, 64)
    assert name in json.dumps(json.loads(run("ps", "--json")))
    assert "cpu" in run("workers")
    run("unload", name, derived)
    run("generate", name, "--prompt", "a", "-o", str(image), code=1)


async def test_the_async_sdk_does_the_main_job(daemon: Daemon, sd_checkpoint: Path) -> None:
    import asyncio

    import denoised.aio as aio

    async with aio.AsyncClient(daemon.target, progress_bar=False) as client:
        pipe = await aio.AutoPipelineForText2Image.from_pretrained(sd_checkpoint, client=client)
        async with pipe:
            results = await asyncio.gather(*(pipe(f"a cat {i}", num_inference_steps=4, **SIZE) for i in range(4)))
            assert all(result.images[0].size == (64, 64) for result in results)
