"""`denoised health`."""

from __future__ import annotations

import typer

from .options import DefaultTarget, Target, Token, connect, fail


def health(target: Target = DefaultTarget, token: Token = None) -> None:
    """Ask whether the daemon takes work, as probes do.

    Exit code 1 while it does not: no worker is live, it drains, or nobody answers.

    [bold]Example[/bold]
    [cyan]until denoised health; do sleep 1; done[/cyan]
    """
    with connect(target, token) as client:
        if not client.is_serving(timeout=4):
            fail("The daemon takes no work.", "No worker is live, or it drains; its log says which.")
    typer.echo("serving")
