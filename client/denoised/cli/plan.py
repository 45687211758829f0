"""`denoised plan`."""

from __future__ import annotations

import dataclasses

import typer

from ..plan import Plan, PlannedComponent
from ..units import format_bytes
from .console import print_json, print_table
from .options import (
    Components,
    DefaultTarget,
    Dtype,
    HubToken,
    Json,
    LocalFilesOnly,
    Overrides,
    Repo,
    Revision,
    SingleFile,
    SingleFileConfig,
    Subfolder,
    Target,
    TaskWanted,
    Token,
    Variant,
    connect,
    parse_assignments,
    parse_components,
)

VERDICTS = {
    "fits": "It fits: {free} are free.",
    "evicts": "It fits once idle components have left the device: {free} are free, {evictable} are idle.",
    "takes turns": "It loads, and its components take turns on the device: {free} are free, {evictable} are idle.",
    "no room": "There is no room now: {free} are free, {evictable} are idle, and the rest is in use or pinned.",
    "never fits": "It never fits: weights may take {budget} in all.",
}
COLUMNS = ("COMPONENT", "CLASS", "DTYPE", "WEIGHTS", "IN FILES", "HELD")


def plan(
    repo: Repo,
    task: TaskWanted = None,
    dtype: Dtype = None,
    variant: Variant = "",
    revision: Revision = "",
    subfolder: Subfolder = "",
    single_file: SingleFile = "",
    config: SingleFileConfig = None,
    override: Overrides = None,
    component: Components = None,
    hub_token: HubToken = None,
    local_files_only: LocalFilesOnly = False,
    json: Json = False,
    target: Target = DefaultTarget,
    token: Token = None,
) -> None:
    """Say what loading a pipeline would take, and whether there is room. Loads nothing.

    Sizes are those in memory, by the headers of the weight files; IN FILES says how they are stored.
    Components whose content is HELD already would be shared. Exits with 1 when loading would fail for want of room.

    [bold]Examples[/bold]
    [cyan]denoised plan stabilityai/stable-diffusion-xl-base-1.0 --dtype float16[/cyan]
    [cyan]denoised plan demo && denoised load demo[/cyan]
    """
    overrides = parse_assignments(override, "--override") | parse_components(component)
    with connect(target, token) as client:
        found = client.plan(
            repo,
            task=task or "",
            dtype=dtype,
            variant=variant,
            revision=revision,
            subfolder=subfolder,
            single_file=single_file,
            config=config,
            overrides=overrides,
            hub_token=hub_token or "",
            local_files_only=local_files_only,
        )
    if json:
        print_json(dataclasses.asdict(found))
    else:
        _print(found)
    if not found.fits:
        raise typer.Exit(1)


def _print(found: Plan) -> None:
    print_table(COLUMNS, [_row(part) for part in found.components], right=("WEIGHTS",))
    new, shared = format_bytes(found.new_bytes), format_bytes(found.shared_bytes)
    typer.echo(f"\n{new} new and {shared} shared on {found.worker}.")
    sizes = {
        name: format_bytes(size)
        for name, size in (
            ("free", found.free_bytes),
            ("evictable", found.evictable_bytes),
            ("budget", found.budget_bytes),
        )
    }
    typer.echo(VERDICTS[found.outcome].format(**sizes))
    for each in found.evictions:
        users = f" of {', '.join(each.pipelines)}" if each.pipelines else ""
        typer.echo(f"  {each.class_name}{users} would leave: {format_bytes(each.freed_bytes)}")
    if found.download_bytes:
        typer.echo(f"{format_bytes(found.download_bytes)} would be downloaded.")
    typer.echo(f"Reading takes about {found.load_seconds:.2g} s.")


def _row(part: PlannedComponent) -> list[str]:
    stored = ", ".join(f"{name} {format_bytes(size)}" for name, size in sorted(part.file_bytes.items()))
    held = "yes" if part.held else ""
    return [part.role, part.class_name, part.dtype, format_bytes(part.weight_bytes), stored, held]
