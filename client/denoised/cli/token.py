"""`denoised token`."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated, Any

import typer

from .console import print_json, print_table
from .options import EXIT_CODES, Json, fail

token = typer.Typer(no_args_is_help=True, help="Make, list and revoke the tokens that a daemon's clients show.")

File = Annotated[
    Path,
    typer.Option(
        "--file",
        envvar="DENOISED_TOKENS_FILE",
        help="The file of tokens: that of the daemon's setting tokens_file, on its machine.",
        metavar="FILE",
    ),
]


@token.command(epilog=EXIT_CODES)
def create(
    name: Annotated[str, typer.Argument(help="Name of the client, for the daemon's audit log and for `revoke`.")],
    file: File,
    scope: Annotated[
        list[str] | None,
        typer.Option(
            help="What the client may do: load, generate, read or admin. Repeatable. Defaults to the first three.",
            metavar="SCOPE",
        ),
    ] = None,
    quota: Annotated[
        list[str] | None,
        typer.Option(
            help="What it may use at most: requests_per_minute, running, waiting, pixel_steps, pipelines, "
            "exclusive_bytes or priority. Repeatable. Defaults to no limits.",
            metavar="NAME=NUMBER",
        ),
    ] = None,
    certificate: Annotated[
        str | None,
        typer.Option(
            help="Common name of the client's certificate, to be let in by it under mTLS in place of a secret.",
            metavar="NAME",
        ),
    ] = None,
) -> None:
    """Make a token and print its secret, which is shown this once: the file only has a digest of it.

    A daemon that uses the file takes it up without a restart.

    [bold]Examples[/bold]
    [cyan]denoised token create alice --file tokens.json[/cyan]
    [cyan]denoised token create web --file tokens.json --scope generate --quota requests_per_minute=60[/cyan]
    """
    tokens, callers = _server("tokens"), _server("callers")
    if not tokens.NAME.fullmatch(name):
        raise typer.BadParameter(f"{name!r} is not made of letters, digits and ._@-", param_hint="NAME")
    known = _read(tokens, file) if file.exists() else []
    if any(each.name == name for each in known):
        fail(f"There is a token {name} already.", "Revoke it first, or take another name.")
    try:
        scopes = frozenset(map(callers.Scope, scope or ("load", "generate", "read")))
    except ValueError as error:
        raise typer.BadParameter(f"{error}.", param_hint="--scope") from error
    secret = "" if certificate else tokens.new_secret()
    digest = tokens.digest(secret) if secret else ""
    limits = _quota(callers, quota or [])
    tokens.write(file, [*known, tokens.Token(name, scopes, digest, certificate or "", limits)])
    if secret:
        typer.echo(secret)


@token.command("list", epilog=EXIT_CODES)
def list_tokens(file: File, json: Json = False) -> None:
    """List the tokens. Their secrets are not known to anybody but their clients."""
    tokens = _server("tokens")
    entries = [tokens.entry(each) for each in _read(tokens, file)]
    if json:
        print_json(entries)
        return
    print_table(
        ["NAME", "SCOPES", "QUOTAS", "CERTIFICATE"],
        [
            [
                entry["name"],
                ",".join(entry["scopes"]),
                ",".join(f"{limit}={value}" for limit, value in entry.get("quota", {}).items()),
                entry.get("certificate", ""),
            ]
            for entry in entries
        ],
    )


@token.command(epilog=EXIT_CODES)
def revoke(name: Annotated[str, typer.Argument(help="Name of the token.")], file: File) -> None:
    """Remove a token. A daemon that uses the file turns its client away from the next call on."""
    tokens = _server("tokens")
    known = _read(tokens, file)
    left = [each for each in known if each.name != name]
    if len(left) == len(known):
        fail(f"There is no token {name}.", "`denoised token list` shows all there are.")
    tokens.write(file, left)


def _server(module: str) -> Any:
    try:
        return importlib.import_module(f"denoised_server.{module}")
    except ModuleNotFoundError as error:
        fail(f"This needs the package {error.name!r}.", "Install it with: pip install 'denoised[server]'")


def _read(tokens: Any, file: Path) -> list[Any]:
    try:
        found: list[Any] = tokens.read(file)
    except tokens.TokenFileError as error:
        fail(str(error))
    return found


def _quota(callers: Any, given: list[str]) -> Any:
    limits = {}
    for item in given:
        name, _, number = item.partition("=")
        if name not in callers.Quota.__dataclass_fields__ or not number.isdigit():
            raise typer.BadParameter(
                f"{item!r} is not the name of a quota, =, and a whole number.", param_hint="--quota"
            )
        limits[name] = int(number)
    return callers.Quota(**limits)
