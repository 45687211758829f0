"""`denoised workers`."""

from __future__ import annotations

from ..units import format_bytes
from ..v1 import worker_service_pb2 as pb
from .console import bar, print_json, print_table, to_json
from .options import DefaultTarget, Json, Target, Token, connect

COLUMNS = (
    "NAME",
    "DEVICE",
    "STATE",
    "WEIGHTS",
    "SAVED",
    "PROCESS",
    "PIPELINES",
    "RUNNING",
    "WAITING",
    "JOINED",
    "RESTARTS",
)


def workers(json: Json = False, target: Target = DefaultTarget, token: Token = None) -> None:
    """List the processes that own the devices: memory, load and batching.

    WEIGHTS is what pipelines hold of the budget, SAVED what sharing saves.
    JOINED is the share of calls that ran in one batch with other generations'.

    [bold]Example[/bold]
    [cyan]watch denoised workers[/cyan]
    """
    with connect(target, token) as client:
        found = client.workers()
    if json:
        print_json([to_json(worker) for worker in found])
        return
    print_table(
        COLUMNS,
        [_row(worker) for worker in found],
        right=COLUMNS[4:],
    )


def _row(worker: pb.Worker) -> list[str]:
    memory, engine = worker.memory, worker.engine
    held = memory.weight_bytes + memory.reserved_bytes
    joined = engine.joined_call_count / engine.call_count if engine.call_count else 0
    return [
        worker.name,
        f"{worker.device} ({worker.device_name})" if worker.device_name else worker.device,
        pb.Worker.State.Name(worker.state).removeprefix("STATE_").lower(),
        f"{bar(held, memory.budget_bytes)} {format_bytes(held)} of {format_bytes(memory.budget_bytes)}",
        format_bytes(memory.shared_saved_bytes),
        format_bytes(memory.process_bytes),
        str(worker.pipeline_count),
        str(worker.running_count),
        str(worker.waiting_count),
        f"{joined:.0%}",
        str(worker.restart_count),
    ]
