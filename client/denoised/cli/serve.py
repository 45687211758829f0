"""`denoised serve`."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated

import typer

from .options import fail


def serve(
    address: Annotated[
        str | None,
        typer.Option(
            help="Where to listen; port 0 picks a free one. Defaults to 127.0.0.1:50051.",
            metavar="HOST:PORT",
            rich_help_panel="Network",
        ),
    ] = None,
    insecure: Annotated[
        bool,
        typer.Option(
            "--insecure",
            help="Listen beyond this machine without TLS: who is on the way can read and change everything.",
            rich_help_panel="Network",
        ),
    ] = False,
    tls_cert: Annotated[
        Path | None,
        typer.Option(
            help="PEM file of the certificate and its chain; turns TLS on.",
            metavar="FILE",
            rich_help_panel="Network",
        ),
    ] = None,
    tls_key: Annotated[
        Path | None,
        typer.Option(help="PEM file of that certificate's key.", metavar="FILE", rich_help_panel="Network"),
    ] = None,
    tls_client_ca: Annotated[
        Path | None,
        typer.Option(
            help="PEM file of the authorities that sign clients' certificates; turns clients without one away.",
            metavar="FILE",
            rich_help_panel="Network",
        ),
    ] = None,
    tokens_file: Annotated[
        Path | None,
        typer.Option(
            help="File of tokens, as `denoised token create` writes it; each call must then show one.",
            metavar="FILE",
            rich_help_panel="Network",
        ),
    ] = None,
    metrics_address: Annotated[
        str | None,
        typer.Option(
            help="Where Prometheus finds the metrics. Defaults to 127.0.0.1:9464.",
            metavar="HOST:PORT",
            rich_help_panel="Network",
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="Which devices to use: auto (all GPUs, else the CPU), cpu, cuda or cuda:N. Defaults to auto.",
            metavar="auto|cpu|cuda[:N]",
            rich_help_panel="Devices",
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1, help="Worker processes on the CPU; a GPU has one. Defaults to 1.", rich_help_panel="Devices"
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="Compute threads of each worker on the CPU.", rich_help_panel="Devices"),
    ] = None,
    allow_dir: Annotated[
        list[Path] | None,
        typer.Option(
            help="A directory that pipelines may be loaded from, besides the model cache. Repeatable.",
            metavar="DIR",
            rich_help_panel="Files",
        ),
    ] = None,
    state_dir: Annotated[
        Path | None,
        typer.Option(help="Where the daemon keeps what outlives it.", metavar="DIR", rich_help_panel="Files"),
    ] = None,
    preload: Annotated[
        list[str] | None,
        typer.Option(
            help="A pipeline to have before the daemon is ready, pinned and shared with all clients. Repeatable.",
            metavar="REPO[,id=ID,task=TASK,dtype=DTYPE]",
            rich_help_panel="Pipelines",
        ),
    ] = None,
    readiness_probe: Annotated[
        str | None,
        typer.Option(
            help="What makes a preloaded pipeline ready: that it is live, or that it also generates. Defaults to load.",
            metavar="load|generate",
            rich_help_panel="Pipelines",
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Settings as TOML. Options and DENOISED_* variables go before it.",
            metavar="FILE",
            rich_help_panel="Files",
        ),
    ] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print every setting with its value, and leave.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log more.")] = False,
) -> None:
    """Run the daemon.

    Prints one line with its address when it is ready.
    SIGTERM and Ctrl-C let it finish what is running and then end it.

    [bold]Examples[/bold]
    [cyan]denoised serve[/cyan]
    [cyan]denoised serve --device cuda --allow-dir /models[/cyan]
    [cyan]denoised serve --address 0.0.0.0:50051 --tls-cert tls.crt --tls-key tls.key --tokens-file tokens.json[/cyan]
    [cyan]denoised serve --preload demo,id=painter --readiness-probe generate[/cyan]
    [cyan]denoised serve --print-config > denoised.toml[/cyan]
    """
    try:
        server = importlib.import_module("denoised_server.server")
    except ModuleNotFoundError as error:
        fail(f"The daemon needs the package {error.name!r}.", "Install it with: pip install 'denoised[server]'")
    given: dict[str, object] = {
        "address": address,
        "insecure": insecure or None,
        "tls_cert": tls_cert,
        "tls_key": tls_key,
        "tls_client_ca": tls_client_ca,
        "tokens_file": tokens_file,
        "metrics_address": metrics_address,
        "device": device,
        "workers": workers,
        "threads": threads,
        "allow_dirs": allow_dir,
        "state_dir": state_dir,
        "preload": preload,
        "readiness_probe": readiness_probe,
    }
    overrides = {name: value for name, value in given.items() if value not in (None, [])}
    raise typer.Exit(server.main(overrides, config_file=config, print_config=print_config, verbose=verbose))
