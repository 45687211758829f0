"""`denoised workers`."""

from __future__ import annotations

from typing import Annotated

import typer

from ..units import format_bytes
from ..v1 import worker_service_pb2 as pb
from .console import bar, print_json, print_table, segments, to_json
from .options import DefaultTarget, Json, Target, Token, connect

COLUMNS = (
    "NAME",
    "DEVICE",
    "STATE",
    "MEMORY",
    "WEIGHTS",
    "SAVED",
    "PROCESS",
    "PIPELINES",
    "RUNNING",
    "WAITING",
    "JOINED",
    "RESTARTS",
)

METHODS = ("WORKER", "METHOD", "CALLS", "JOINED", "ALONE BECAUSE", "VERIFIED", "WITHIN", "REFUSED", "BEYOND")

MEMORY = (
    "WORKER",
    "MEMORY",
    "TOTAL",
    "BUDGET",
    "WEIGHTS",
    "RESERVED",
    "EVICTABLE",
    "WORKING SET",
    "OF",
    "CACHED",
    "UNACCOUNTED",
    "UNRECLAIMED",
    "HEADROOM",
    "FREE",
)
FUSED = ("WORKER", "FUSED", "PROVEN", "OTHERS", "PROMPTS AGAIN", "KEPT")

Engine = Annotated[bool, typer.Option("--engine", help="Show what became of calls, by component method.")]


Memory = Annotated[bool, typer.Option("--memory", help="Show what the memory of each device is used for.")]


def workers(
    engine: Engine = False,
    memory: Memory = False,
    json: Json = False,
    target: Target = DefaultTarget,
    token: Token = None,
) -> None:
    """List the processes that own the devices: memory, load and batching.

    MEMORY is the whole device: █ weights, ▓ what calls work in, ▒ what the allocator keeps, ░ what is in no book, · the
    rest. WEIGHTS is what pipelines hold of the budget, SAVED what sharing saves.
    JOINED is the share of calls that ran in one batch with other generations'.
    With --engine: VERIFIED kinds of joined call differ from lone ones by no more
    than WITHIN, REFUSED ones by BEYOND or more; 1 is the tolerance. FUSED
    generations ran as one call with others that were equal but for prompt, seed
    and images; that was PROVEN equal for so many kinds, and not for OTHERS.
    PROMPTS AGAIN were answered with what text encoders came to before, of which
    so many bytes are KEPT.

    [bold]Example[/bold]
    [cyan]watch denoised workers[/cyan]
    """
    with connect(target, token) as client:
        found = client.workers()
    if json:
        print_json([to_json(worker) for worker in found])
        return
    if engine:
        rows = [_method_row(worker.name, stats) for worker in found for stats in worker.engine.methods]
        print_table(METHODS, rows, right=("CALLS", "JOINED", "VERIFIED", "WITHIN", "REFUSED", "BEYOND"))
        print_table(FUSED, [_fused_row(worker.name, worker.engine) for worker in found], right=FUSED[1:])
        return
    if memory:
        print_table(MEMORY, [_memory_row(worker) for worker in found], right=MEMORY[2:])
        return
    print_table(
        COLUMNS,
        [_row(worker) for worker in found],
        right=COLUMNS[5:],
    )


def _method_row(worker: str, stats: pb.MethodStats) -> list[str]:
    reasons = sorted(stats.lone_call_counts.items(), key=lambda item: -item[1])
    return [
        worker,
        stats.method,
        str(stats.call_count),
        f"{stats.joined_call_count / stats.call_count:.0%}" if stats.call_count else "",
        ", ".join(f"{reason} {count}" for reason, count in reasons),
        str(stats.verified_kind_count),
        f"{stats.agreed_difference:.2g}" if stats.HasField("agreed_difference") else "",
        str(stats.refused_kind_count),
        f"{stats.refused_difference:.2g}" if stats.HasField("refused_difference") else "",
    ]


def _fused_row(worker: str, stats: pb.EngineStats) -> list[str]:
    return [
        worker,
        str(stats.fused_generation_count),
        str(stats.fusible_kind_count),
        str(stats.unfusible_kind_count),
        str(stats.embedding_hit_count),
        format_bytes(stats.embedding_bytes),
    ]


def _memory_row(worker: pb.Worker) -> list[str]:
    memory = worker.memory
    sizes = (
        memory.total_bytes,
        memory.budget_bytes,
        memory.weight_bytes,
        memory.reserved_bytes,
        memory.evictable_bytes,
        memory.working_set_bytes,
        memory.working_set_budget_bytes,
        memory.cached_bytes,
        memory.unaccounted_bytes,
        memory.unreclaimed_bytes,
        memory.headroom_bytes,
        memory.free_bytes,
    )
    return [worker.name, device_bar(memory), *map(format_bytes, sizes)]


def device_bar(memory: pb.DeviceMemory) -> str:
    """What a device's memory is used for, in one picture."""
    return segments(memory_parts(memory), memory.total_bytes)


def memory_parts(memory: pb.DeviceMemory) -> tuple[tuple[str, int], ...]:
    """Bytes of each use of a device's memory, and the block that stands for it."""
    return (
        ("█", memory.weight_bytes + memory.reserved_bytes),
        ("▓", memory.working_set_bytes),
        ("▒", memory.cached_bytes),
        ("░", max(0, memory.unaccounted_bytes)),
    )


def _row(worker: pb.Worker) -> list[str]:
    memory, engine = worker.memory, worker.engine
    held = memory.weight_bytes + memory.reserved_bytes
    joined = engine.joined_call_count / engine.call_count if engine.call_count else 0
    return [
        worker.name,
        f"{worker.device} ({worker.device_name})" if worker.device_name else worker.device,
        pb.Worker.State.Name(worker.state).removeprefix("STATE_").lower(),
        device_bar(memory),
        f"{bar(held, memory.budget_bytes)} {format_bytes(held)} of {format_bytes(memory.budget_bytes)}",
        format_bytes(memory.shared_saved_bytes),
        format_bytes(memory.process_bytes),
        str(worker.pipeline_count),
        str(worker.running_count),
        str(worker.waiting_count),
        f"{joined:.0%}",
        str(worker.restart_count),
    ]
