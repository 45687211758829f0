"""`denoised load`, `derive`, `ps` and `unload`."""

from __future__ import annotations

from typing import Annotated

import typer

from ..progress import LoadingBar
from ..units import format_bytes, format_seconds, from_duration
from ..v1 import pipeline_service_pb2 as pb
from .console import ago, bar, print_json, print_table, to_json, until
from .options import (
    Components,
    DefaultTarget,
    Dtype,
    ForceDownload,
    HubToken,
    Json,
    KeepAlive,
    LocalFilesOnly,
    Overrides,
    Pinned,
    PipelineId,
    Quantizations,
    Repo,
    Revision,
    Shared,
    SingleFile,
    SingleFileConfig,
    Subfolder,
    Target,
    Task,
    TaskWanted,
    Token,
    Ttl,
    Variant,
    connect,
    parse_assignments,
    parse_components,
    parse_quantizations,
    parse_ttl,
)


def load(
    repo: Repo,
    task: TaskWanted = None,
    dtype: Dtype = None,
    pipeline_id: PipelineId = None,
    ttl: Ttl = None,
    variant: Variant = "",
    revision: Revision = "",
    subfolder: Subfolder = "",
    single_file: SingleFile = "",
    config: SingleFileConfig = None,
    override: Overrides = None,
    component: Components = None,
    quantize: Quantizations = None,
    hub_token: HubToken = None,
    local_files_only: LocalFilesOnly = False,
    force_download: ForceDownload = False,
    shared: Shared = False,
    pinned: Pinned = False,
    keep_alive: KeepAlive = None,
    json: Json = False,
    target: Target = DefaultTarget,
    token: Token = None,
) -> None:
    """Load a pipeline and print its handle.

    Components whose content is already on the device are shared, not loaded again.

    [bold]Examples[/bold]
    [cyan]denoised load demo[/cyan]
    [cyan]denoised load stabilityai/stable-diffusion-xl-base-1.0 --dtype float16 --variant fp16 --ttl 2h[/cyan]
    [cyan]denoised load owner/name --component controlnet=owner/canny --component vae=other/name:vae[/cyan]
    [cyan]PIPE=$(denoised load demo --task text-to-image --override safety_checker=null)[/cyan]
    """
    overrides, seconds = parse_assignments(override, "--override") | parse_components(component), parse_ttl(ttl)
    with connect(target, token) as client, LoadingBar({"disable": None}) as bar:
        pipe = client.load(
            repo,
            task=task or "",
            dtype=dtype,
            variant=variant,
            revision=revision,
            subfolder=subfolder,
            single_file=single_file,
            config=config,
            overrides=overrides,
            quantization_config=parse_quantizations(quantize),
            hub_token=hub_token or "",
            local_files_only=local_files_only,
            force_download=force_download,
            ttl=seconds,
            pipeline_id=pipeline_id or "",
            shared=shared,
            pinned=pinned,
            keep_alive=parse_ttl(keep_alive),
            on_progress=bar,
        )
    _print_handle(pipe.info, json=json)


def derive(
    name: Annotated[str, typer.Argument(help="The pipeline whose components to use: its handle, or the id alone.")],
    task: Annotated[Task, typer.Option(help="What the new pipeline is for.")],
    pipeline_id: PipelineId = None,
    ttl: Ttl = None,
    override: Overrides = None,
    component: Components = None,
    hub_token: HubToken = None,
    local_files_only: LocalFilesOnly = False,
    force_download: ForceDownload = False,
    shared: Shared = False,
    pinned: Pinned = False,
    keep_alive: KeepAlive = None,
    json: Json = False,
    target: Target = DefaultTarget,
    token: Token = None,
) -> None:
    """Make a pipeline for another task from a live one, without new memory but for components that it is given.

    Both are pipelines in their own right: unload either, the other stays.

    [bold]Example[/bold]
    [cyan]denoised derive pipelines/apples --task inpainting --id apples-inpaint[/cyan]
    """
    overrides, seconds = parse_assignments(override, "--override") | parse_components(component), parse_ttl(ttl)
    with connect(target, token) as client:
        pipe = client.derive(
            name,
            task,
            overrides=overrides,
            ttl=seconds,
            pipeline_id=pipeline_id or "",
            shared=shared,
            pinned=pinned,
            keep_alive=parse_ttl(keep_alive),
            hub_token=hub_token or "",
            local_files_only=local_files_only,
            force_download=force_download,
        )
    _print_handle(pipe.info, json=json)


def ps(json: Json = False, target: Target = DefaultTarget, token: Token = None) -> None:
    """List the live pipelines and what each costs.

    RESIDENCY is the share of its weights that is on the device, and the lowest place where some are.
    EXCLUSIVE goes away with the pipeline, SHARED is used by others as well.
    IDLE is the time since its last use, KEEP after how much of it its weights leave the device, EXPIRES what is left of
    its lease.

    [bold]Example[/bold]
    [cyan]denoised ps --json | jq -r '.[].name'[/cyan]
    """
    with connect(target, token) as client:
        pipelines = [pipe.info for pipe in client.pipelines()]
    if json:
        print_json([to_json(info) for info in pipelines])
        return
    print_table(
        [
            "NAME",
            "CLASS",
            "TASK",
            "STATE",
            "RESIDENCY",
            "EXCLUSIVE",
            "SHARED",
            "WORKER",
            "RUNNING",
            "IDLE",
            "KEEP",
            "EXPIRES",
        ],
        [_row(info) for info in pipelines],
        right=["EXCLUSIVE", "SHARED", "RUNNING"],
    )


def unload(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Handles, or their ids alone.")],
    force: Annotated[
        bool, typer.Option("--force", help="Stop the generations that are running instead of waiting for them.")
    ] = False,
    json: Json = False,
    target: Target = DefaultTarget,
    token: Token = None,
) -> None:
    """Let go of pipelines and say how much memory that freed.

    Weights that other pipelines use as well stay for them. Unloading a pipeline again succeeds.

    [bold]Examples[/bold]
    [cyan]denoised unload pipelines/apples apples-inpaint[/cyan]
    [cyan]denoised unload $(denoised ps --json | jq -r '.[].name')[/cyan]
    """
    freed: dict[str, int] = {}
    with connect(target, token) as client:
        for name in names:
            freed[name] = client.unload(name, force=force)
            if not json:
                typer.echo(f"{name}: {format_bytes(freed[name])} freed")
    if json:
        print_json([{"name": name, "freed_bytes": size} for name, size in freed.items()])


def _print_handle(info: pb.Pipeline, *, json: bool) -> None:
    if json:
        print_json(to_json(info))
    else:
        typer.echo(info.name)


def residency(info: pb.Pipeline) -> str:
    """How much of its weights is on the device, and the lowest tier where some are."""
    total = info.device_bytes + info.host_bytes + info.disk_bytes
    tier = pb.Residency.Name(info.residency).removeprefix("RESIDENCY_").lower()
    return f"{bar(info.device_bytes, total, 5)} {tier}"


def _kept(info: pb.Pipeline) -> str:
    if info.pinned:
        return "pinned"
    return format_seconds(from_duration(info.keep_alive)) if info.HasField("keep_alive") else ""


def _row(info: pb.Pipeline) -> list[str]:
    return [
        info.name,
        info.pipeline_class,
        pb.Task.Name(info.task).removeprefix("TASK_").replace("_", "-").lower(),
        pb.Pipeline.State.Name(info.state).removeprefix("STATE_").lower(),
        residency(info),
        format_bytes(info.exclusive_bytes),
        format_bytes(info.shared_bytes),
        info.worker.removeprefix("workers/"),
        str(info.generation_count),
        ago(info.last_use_time),
        _kept(info),
        until(info.expire_time),
    ]
