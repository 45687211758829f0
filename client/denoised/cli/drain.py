"""`denoised drain`."""

from __future__ import annotations

from typing import Annotated

import typer

from .options import DefaultTarget, Target, Token, connect

Undo = Annotated[bool, typer.Option("--undo", help="Make it take work again.")]
Name = Annotated[str, typer.Argument(help="A worker, as `denoised workers` names it.", metavar="WORKER")]


def drain(worker: Name, undo: Undo = False, target: Target = DefaultTarget, token: Token = None) -> None:
    """Take a worker out of work, and wait until what it runs has ended.

    Its pipelines are built again on other workers when they are used next.
    Interrupting the command does not undo it; it ends with the daemon.

    [bold]Example[/bold]
    [cyan]denoised drain workers/0[/cyan]
    [cyan]denoised drain workers/0 --undo[/cyan]
    """
    name = worker if "/" in worker else f"workers/{worker}"
    with connect(target, token) as client:
        if undo:
            client.resume_worker(name)
        else:
            client.drain_worker(name)
    typer.echo(f"{name} takes work" if undo else f"{name} is drained")
