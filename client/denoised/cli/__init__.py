"""The command `denoised`."""

from __future__ import annotations

from typing import Annotated

import typer

from ..version import __version__
from .drain import drain
from .generate import generate
from .generations import cancel, generations, result
from .health import health
from .options import EXIT_CODES, Commands, connecting
from .pipelines import derive, load, ps, unload
from .plan import plan
from .reproduce import reproduce
from .serve import serve
from .token import token
from .top import top
from .workers import workers

app = typer.Typer(
    name="denoised",
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=EXIT_CODES,
)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"denoised {__version__}")
        raise typer.Exit


@app.callback()
def denoised(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Keep diffusers pipelines live in a daemon, and use them from anywhere.

    [bold]A first picture[/bold]
    [cyan]denoised serve &[/cyan]
    [cyan]denoised load demo --id apples[/cyan]
    [cyan]denoised generate apples -p "a red apple" -o apple.png[/cyan]

    [bold]Another task on the same weights[/bold]
    [cyan]denoised derive apples --task image-to-image --id apples-i2i[/cyan]
    [cyan]denoised generate apples-i2i -p "a tangerine" --image apple.png -o tangerine.png[/cyan]

    [bold]What is held, and what it costs[/bold]
    [cyan]denoised ps[/cyan]
    [cyan]denoised unload apples apples-i2i[/cyan]

    Commands talk to 127.0.0.1:50051; name another daemon with --target or DENOISED_TARGET.
    """


app.command(rich_help_panel="Daemon", epilog=EXIT_CODES)(serve)
app.command(rich_help_panel="Daemon", epilog=EXIT_CODES)(connecting(workers))
app.command(rich_help_panel="Daemon", epilog=EXIT_CODES)(connecting(top))
app.command(rich_help_panel="Daemon", epilog=EXIT_CODES)(connecting(health))
app.command(rich_help_panel="Daemon", epilog=EXIT_CODES)(connecting(drain))
app.add_typer(token, name="token", rich_help_panel="Daemon")
app.command(rich_help_panel="Pipelines", epilog=EXIT_CODES)(connecting(load))
app.command(rich_help_panel="Pipelines", epilog=EXIT_CODES)(connecting(plan))
app.command(rich_help_panel="Pipelines", epilog=EXIT_CODES)(connecting(derive))
app.command(rich_help_panel="Pipelines", epilog=EXIT_CODES)(connecting(ps))
app.command(rich_help_panel="Pipelines", epilog=EXIT_CODES)(connecting(unload))
app.command(rich_help_panel="Generations", epilog=EXIT_CODES)(connecting(generate))
app.command(rich_help_panel="Generations", epilog=EXIT_CODES)(connecting(reproduce))
app.command(rich_help_panel="Generations", epilog=EXIT_CODES)(connecting(generations))
app.command(rich_help_panel="Generations", epilog=EXIT_CODES)(connecting(result))
app.command(rich_help_panel="Generations", epilog=EXIT_CODES)(connecting(cancel))

__all__ = ["app"]
