"""`denoised top`."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ..client import Client
from ..errors import DenoisedError
from ..units import format_bytes
from ..v1 import generation_service_pb2, pipeline_service_pb2, worker_service_pb2
from .console import ago, bar, segments, until
from .options import DefaultTarget, Target, Token, connect
from .pipelines import residency
from .workers import memory_parts

# Those that are furthest come first; a longer list would push itself off the screen.
MAX_GENERATIONS = 20
BAR_WIDTH = 20
# What a device's memory is used for: each block's heading, and its colour in the bar.
MEMORY = {"█": ("WEIGHTS", "green"), "▓": ("WORKING SET", "yellow"), "▒": ("CACHE", "blue"), "░": ("IN NO BOOK", "red")}
MEMORY_WIDTH = 40


@dataclass(frozen=True, slots=True)
class View:
    """What a daemon says at one moment."""

    target: str
    version: str
    time: float
    workers: Sequence[worker_service_pb2.Worker]
    pipelines: Sequence[pipeline_service_pb2.Pipeline]
    generations: Sequence[generation_service_pb2.Generation] = ()

    @classmethod
    def of(cls, client: Client, workers: Sequence[worker_service_pb2.Worker] | None = None) -> View:
        return cls(
            target=client.target,
            version=client.server_info().version,
            time=time.monotonic(),
            workers=client.workers() if workers is None else workers,
            pipelines=[pipe.info for pipe in client.pipelines()],
            # Not those that are over and wait for their callers.
            generations=[job.info for job in client.generations() if not job.info.HasField("end_time")],
        )


class Watched:
    """The workers as the daemon told of each last."""

    def __init__(self, client: Client, interval: float) -> None:
        self._client, self._interval = client, interval
        self._workers = {worker.name: worker for worker in client.workers()}
        threading.Thread(target=self._watch, daemon=True).start()

    @property
    def latest(self) -> list[worker_service_pb2.Worker]:
        return list(self._workers.values())

    def _watch(self) -> None:
        while True:
            # What is wrong is told by whatever else is asked of the daemon; it may be back soon.
            with suppress(DenoisedError):
                for told in self._client.watch_workers(self._interval):
                    self._workers[told.worker.name] = told.worker
            time.sleep(self._interval)


def top(
    once: Annotated[bool, typer.Option("--once", help="Print one picture and leave, for scripts.")] = False,
    interval: Annotated[float, typer.Option(min=0.2, help="Seconds between two pictures.", metavar="SECONDS")] = 1.0,
    target: Target = DefaultTarget,
    token: Token = None,
) -> None:
    """Watch devices, pipelines, queues and steps live. Ctrl-C leaves.

    Memory is the whole device: weights, what calls work in, what the allocator keeps, what is in no book, and the rest.
    CALLS and BATCHES are of the last interval, each second; JOINED is the share of calls that shared a batch then.
    RESIDENCY is the share of a pipeline's weights that is on the device, and the lowest place where some are.
    The generations are those that you may see, the furthest first.

    [bold]Example[/bold]
    [cyan]denoised top --once | head -3[/cyan]
    """
    with connect(target, token) as client:
        view = View.of(client)
        if once:
            time.sleep(min(interval, 1.0))
            Console().print(picture(View.of(client), view))
            return
        watched = Watched(client, interval)
        with Live(picture(view, view), screen=True, auto_refresh=False) as live:
            while True:
                time.sleep(interval)
                before, view = view, View.of(client, watched.latest)
                live.update(picture(view, before), refresh=True)


def picture(view: View, before: View) -> RenderableType:
    """Everything on one page; rates are between the two views."""
    running = sum(worker.running_count for worker in view.workers)
    waiting = sum(worker.waiting_count for worker in view.workers)
    head = Text.assemble(
        ("denoised ", "bold"),
        f"{view.version} on {view.target}   ",
        (f"{running} running", "bold green" if running else "dim"),
        "   ",
        (f"{waiting} waiting", "bold yellow" if waiting else "dim"),
        f"   {len(view.pipelines)} pipelines",
    )
    earlier = {worker.name: worker.engine for worker in before.workers}
    seconds = max(view.time - before.time, 1e-9)
    parts: list[RenderableType] = [
        head,
        workers_table(view.workers, earlier, seconds),
        memory_table(view.workers),
        pipelines_table(view.pipelines),
    ]
    if view.generations:
        parts.append(generations_table(view.generations))
    return Group(*(line for part in parts for line in (part, Text())))


def workers_table(
    workers: Sequence[worker_service_pb2.Worker], earlier: Mapping[str, worker_service_pb2.EngineStats], seconds: float
) -> Table:
    table = _table(
        "WORKER", "DEVICE", "STATE", "WEIGHTS", "SAVED", right=("RUNNING", "WAITING", "CALLS", "BATCHES", "JOINED")
    )
    for worker in workers:
        memory, engine = worker.memory, worker.engine
        before = earlier.get(worker.name, engine)
        calls, batches, joined = (
            # A worker that was started anew counts from zero.
            max(0, getattr(engine, count) - getattr(before, count))
            for count in ("call_count", "batch_count", "joined_call_count")
        )
        held = memory.weight_bytes + memory.reserved_bytes
        state = worker_service_pb2.Worker.State.Name(worker.state).removeprefix("STATE_").lower()
        table.add_row(
            worker.name,
            worker.device,
            Text(state, "green" if state == "active" else "yellow"),
            f"{bar(held, memory.budget_bytes)} {format_bytes(held)} of {format_bytes(memory.budget_bytes)}",
            format_bytes(memory.shared_saved_bytes),
            str(worker.running_count),
            str(worker.waiting_count),
            f"{calls / seconds:.0f}/s",
            f"{batches / seconds:.0f}/s",
            f"{joined / calls:.0%}" if calls else "",
        )
    return table


def memory_table(workers: Sequence[worker_service_pb2.Worker]) -> Table:
    headings = [Text.assemble((block, color), f" {name}") for block, (name, color) in MEMORY.items()]
    table = _table("WORKER", "MEMORY", right=(*headings, "· FREE"))
    for worker in workers:
        memory = worker.memory
        bar = Text(segments(memory_parts(memory), memory.total_bytes, MEMORY_WIDTH))
        for block, (_, color) in MEMORY.items():
            bar.highlight_regex(block, color)
        sizes = (*(size for _, size in memory_parts(memory)), memory.free_bytes)
        table.add_row(worker.name, bar, *map(format_bytes, sizes))
    return table


def pipelines_table(pipelines: Sequence[pipeline_service_pb2.Pipeline]) -> Table:
    table = _table(
        *("PIPELINE", "CLASS", "STATE", "WORKER", "RESIDENCY"),
        right=("RUNNING", "EXCLUSIVE", "SHARED", "IDLE", "EXPIRES"),
    )
    # What is busy first.
    for info in sorted(pipelines, key=lambda info: -info.generation_count):
        state = pipeline_service_pb2.Pipeline.State.Name(info.state).removeprefix("STATE_").lower()
        table.add_row(
            info.name.removeprefix("pipelines/"),
            info.pipeline_class,
            Text(state, "green" if state == "active" else "yellow"),
            info.worker.removeprefix("workers/"),
            residency(info),
            Text(str(info.generation_count), "bold green" if info.generation_count else "dim"),
            format_bytes(info.exclusive_bytes),
            format_bytes(info.shared_bytes),
            ago(info.last_use_time),
            until(info.expire_time),
        )
    return table


def generations_table(generations: Sequence[generation_service_pb2.Generation]) -> Table:
    table = _table("GENERATION", "PIPELINE", "STATE", "STEPS", right=("", "AGE"))
    ordered = sorted(generations, key=lambda info: -info.progress.completed_steps)
    for info in ordered[:MAX_GENERATIONS]:
        done, total = info.progress.completed_steps, info.progress.total_steps
        state = generation_service_pb2.Generation.State.Name(info.state).removeprefix("STATE_").lower()
        table.add_row(
            info.name.removeprefix("generations/"),
            info.pipeline.removeprefix("pipelines/"),
            Text(state, "green" if state == "running" else "yellow"),
            bar(done, total, BAR_WIDTH) if total else "",
            f"{done} of {total}" if total else "",
            ago(info.create_time),
        )
    if len(ordered) > MAX_GENERATIONS:
        table.caption, table.caption_justify = f"and {len(ordered) - MAX_GENERATIONS} more", "left"
    return table


def _table(*left: str, right: Sequence[str | Text]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold dim")
    for title in left:
        table.add_column(title, no_wrap=True)
    for heading in right:
        table.add_column(heading, justify="right", no_wrap=True)
    return table
