"""`denoised generations`, `result` and `cancel`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..units import format_bytes
from ..v1 import generation_service_pb2 as pb
from .console import ago, print_json, print_table, to_json, until
from .generate import check_output, deliver
from .options import DefaultTarget, Json, Target, Token, connect

Name = Annotated[str, typer.Argument(help="The generation: its name, or the id alone.")]


def generations(json: Json = False, target: Target = DefaultTarget, token: Token = None) -> None:
    """List the generations that wait or run, and the detached ones whose results are kept.

    EXPIRES is how long a result is still kept, SIZE what it takes on the daemon's disk.

    [bold]Example[/bold]
    [cyan]denoised generations --json | jq -r '.[] | select(.state == "STATE_SUCCEEDED").name'[/cyan]
    """
    with connect(target, token) as client:
        found = [job.info for job in client.generations()]
    if json:
        print_json([to_json(info) for info in found])
        return
    print_table(
        ["NAME", "PIPELINE", "STATE", "STEPS", "SIZE", "AGE", "EXPIRES", "WHY"],
        [_row(info) for info in found],
        right=["STEPS", "SIZE"],
    )


def result(
    name: Name,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Where to write the image; as for `denoised generate`.")
    ] = Path("image.png"),
    timeout: Annotated[float | None, typer.Option(help="Seconds to wait for its end.")] = None,
    json: Json = False,
    target: Target = DefaultTarget,
    token: Token = None,
) -> None:
    """Wait for a detached generation and write what it made.

    Can be asked for again for as long as the daemon keeps the result.

    [bold]Example[/bold]
    [cyan]denoised result $(denoised generate apples -p "a red apple" --detach) -o apple.png[/cyan]
    """
    check_output(output, json=json)
    with connect(target, token) as client:
        found = client.generation(name).result(timeout=timeout)
    deliver(found, output, json=json)


def cancel(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Generations: their names, or the ids alone.")],
    target: Target = DefaultTarget,
    token: Token = None,
) -> None:
    """End generations at their next step.

    Those that are over stay as they are.

    [bold]Example[/bold]
    [cyan]denoised cancel generations/g0123456789abcdef[/cyan]
    """
    with connect(target, token) as client:
        for name in names:
            job = client.generation(name)
            job.cancel()
            typer.echo(f"{job.name}: {job.state}")


def _row(info: pb.Generation) -> list[str]:
    return [
        info.name,
        info.pipeline,
        pb.Generation.State.Name(info.state).removeprefix("STATE_").lower(),
        f"{info.progress.completed_steps}/{info.progress.total_steps}" if info.HasField("progress") else "",
        format_bytes(info.result_bytes) if info.result_bytes else "",
        ago(info.create_time),
        until(info.expire_time),
        info.error_reason,
    ]
