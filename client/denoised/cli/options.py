"""What the commands have in common: options, the connection, and how failures end."""

from __future__ import annotations

import enum
import functools
import inspect
import json
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from .. import traces
from ..adapter import Adapter
from ..channel import (
    CA_VARIABLE,
    CLIENT_CERT_VARIABLE,
    CLIENT_KEY_VARIABLE,
    DEFAULT_TARGET,
    TARGET_VARIABLE,
    TOKEN_VARIABLE,
)
from ..client import Client
from ..component import Component
from ..errors import DenoisedError
from ..spec import TASKS
from ..units import to_seconds

EXIT_CODES = "[dim]Exit codes: 0 it worked · 1 it failed, stderr says why · 2 wrong usage · 130 interrupted.[/dim]"

Target = Annotated[
    str,
    typer.Option(
        envvar=TARGET_VARIABLE, help="Where the daemon is.", metavar="HOST:PORT", rich_help_panel="Connection"
    ),
]
Token = Annotated[
    str | None,
    typer.Option(envvar=TOKEN_VARIABLE, help="Bearer token, if the daemon asks for one.", rich_help_panel="Connection"),
]
Ca = Annotated[
    str | None,
    typer.Option(
        envvar=CA_VARIABLE,
        help="For TLS: PEM file of the authority that signed the daemon's certificate, or system for the usual ones.",
        metavar="FILE",
        rich_help_panel="Connection",
    ),
]
ClientCert = Annotated[
    str | None,
    typer.Option(
        envvar=CLIENT_CERT_VARIABLE,
        help="PEM file of the certificate to show, if the daemon asks for one.",
        metavar="FILE",
        rich_help_panel="Connection",
    ),
]
ClientKey = Annotated[
    str | None,
    typer.Option(
        envvar=CLIENT_KEY_VARIABLE,
        help="PEM file of that certificate's key.",
        metavar="FILE",
        rich_help_panel="Connection",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts instead of text for people.")]
KeepAlive = Annotated[
    str | None,
    typer.Option(
        help="How long its weights stay on the device after its last use when nobody else needs their room, such as 0, "
        "90s, 30m. Defaults to without end.",
        metavar="DURATION",
    ),
]
Pinned = Annotated[bool, typer.Option("--pinned", help="Keep it whatever its lease says, and on the device.")]
Ttl = Annotated[
    str | None,
    typer.Option(
        help="How long it stays after its last use, such as 90s, 30m, 1h, 2d. Defaults to the daemon's setting.",
        metavar="DURATION",
    ),
]
PipelineId = Annotated[
    str | None,
    typer.Option(
        "--id",
        help="Name it yourself: lower-case letters, digits and hyphens. Defaults to an id that cannot be guessed.",
        metavar="ID",
    ),
]
Shared = Annotated[bool, typer.Option("--shared", help="Let other clients see and use it.")]
Task = enum.StrEnum("Task", {name.replace("-", "_"): name for name in TASKS})  # type: ignore[misc]
Repo = Annotated[
    str,
    typer.Argument(
        help="A repository on the Hugging Face Hub (owner/name), a directory that the daemon may read, or an "
        "embedded model such as demo."
    ),
]
TaskWanted = Annotated[
    Task | None, typer.Option(help="What it is for. Defaults to the class that the checkpoint names.")
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="Element type of the weights: float32 (the default), float16, bfloat16, float64, or auto for that of "
        "the files."
    ),
]
Variant = Annotated[str, typer.Option(help="Weight variant, such as fp16.")]
Revision = Annotated[str, typer.Option(help="Branch, tag or commit. Defaults to main.")]
Subfolder = Annotated[str, typer.Option(help="Folder inside the repository that has the pipeline.")]
SingleFile = Annotated[
    str, typer.Option(help="Safetensors file inside the repository that has the weights of all components.")
]
SingleFileConfig = Annotated[
    str | None,
    typer.Option(help="Repository or directory that describes the single file. Defaults to where the file is."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--override",
        help="Leave a component out (safety_checker=null) or set a constructor option (requires_safety_checker=false). "
        "Repeatable.",
        metavar="ROLE=JSON",
    ),
]
Components = Annotated[
    list[str] | None,
    typer.Option(
        "--component",
        help="Take a component from elsewhere: vae=owner/name, unet=owner/name:unet, controlnet=/models/net, or a part "
        "of a live pipeline, vae=pipelines/ID:vae. Repeat a role for several in it.",
        metavar="ROLE=REPO[:SUBFOLDER]",
    ),
]
Quantizations = Annotated[
    list[str] | None,
    typer.Option(
        "--quantize",
        help="Quantise a component while it is read: unet=quanto:weights_dtype=int8, text_encoder=quanto:weights=int8, "
        "transformer=bitsandbytes_4bit. Repeatable.",
        metavar="ROLE=BACKEND[:NAME=VALUE,…]",
    ),
]
HubToken = Annotated[
    str | None,
    typer.Option(
        envvar="DENOISED_HUB_TOKEN",
        help="Token of the Hugging Face Hub, for gated and private repositories. Used for these downloads only.",
        rich_help_panel="Hub",
    ),
]
LocalFilesOnly = Annotated[
    bool,
    typer.Option("--local-files-only", help="Use only what is in the daemon's cache.", rich_help_panel="Hub"),
]
ForceDownload = Annotated[
    bool,
    typer.Option("--force-download", help="Download again what is in the daemon's cache.", rich_help_panel="Hub"),
]

DefaultTarget = DEFAULT_TARGET

_certificates: ContextVar[dict[str, Any]] = ContextVar("certificates")


class Commands(TyperGroup):
    """Ends failed commands with a sentence and a hint instead of a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except DenoisedError as error:
            fail(error.message, error.hint)
        except OSError as error:
            # Files that cannot be read or written; what a daemon says is a DenoisedError.
            fail(str(error))


def fail(message: str, hint: str = "") -> NoReturn:
    """Says on stderr what went wrong and ends with exit code 1."""
    typer.secho(f"error: {message}", fg="red", err=True)
    if hint:
        typer.echo(f"hint:  {hint}", err=True)
    raise typer.Exit(1)


def connecting(command: Callable[..., None]) -> Callable[..., None]:
    """A command that talks to a daemon, with the options for TLS, which `connect` looks up."""

    @functools.wraps(command)
    def connected(*, ca: Ca, client_cert: ClientCert, client_key: ClientKey, **given: Any) -> None:
        _certificates.set({"ca": ca, "client_cert": client_cert, "client_key": client_key})
        send_traces = traces.set_up("denoised-cli")
        try:
            command(**given)
        finally:
            send_traces()

    # typer reads the options from the signature.
    signature = inspect.signature(command, eval_str=True)
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=option)
        for name, option in (("ca", Ca), ("client_cert", ClientCert), ("client_key", ClientKey))
    ]
    parameters = [*signature.parameters.values(), *added]
    vars(connected)["__signature__"] = signature.replace(parameters=parameters)
    connected.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return connected


def connect(target: str, token: str | None) -> Client:
    return Client(target, token=token, **_certificates.get())


def parse_ttl(text: str | None) -> float | None:
    """Raises typer.BadParameter for what is no duration."""
    if text is None:
        return None
    try:
        return to_seconds(text)
    except DenoisedError as error:
        raise typer.BadParameter(str(error)) from error


def parse_assignments(items: Sequence[str] | None, option: str) -> dict[str, Any]:
    """ "name=json" items as a dict; what is no JSON counts as text. Raises typer.BadParameter without "="."""
    values: dict[str, Any] = {}
    for item in items or ():
        name, equals, text = item.partition("=")
        if not equals or not name.isidentifier():
            raise typer.BadParameter(f"{item!r} is not of the form NAME=VALUE.", param_hint=option)
        try:
            values[name] = json.loads(text)
        except json.JSONDecodeError:
            values[name] = text
    return values


def parse_adapters(items: Sequence[str] | None) -> list[Adapter] | None:
    """ "repo:scale" items. Raises typer.BadParameter for a scale that is none."""
    if not items:
        return None
    adapters = []
    for item in items:
        source, colon, scale = item.rpartition(":")
        source = source if colon else item
        folder, _, name = source.rpartition("/")
        if not name.endswith(".safetensors"):
            folder, name = source, ""
        try:
            adapters.append(Adapter(folder, float(scale) if colon else 1.0, weight_name=name))
        except ValueError as error:
            raise typer.BadParameter(f"{scale!r} is no number.", param_hint="--lora") from error
    return adapters


def parse_components(items: Sequence[str] | None) -> dict[str, Any]:
    """Components by role, several in one role as a list. Raises typer.BadParameter for what names none."""
    found: dict[str, list[Component]] = {}
    for item in items or ():
        role, equals, text = item.partition("=")
        repo_id, _, subfolder = text.partition(":")
        if not equals or not role.isidentifier() or not repo_id:
            raise typer.BadParameter(f"{item!r} is not of the form ROLE=REPO[:SUBFOLDER].", param_hint="--component")
        if repo_id.startswith("pipelines/"):
            component = Component(pipeline=repo_id, role=subfolder or role)
        else:
            component = Component(repo_id, subfolder)
        found.setdefault(role, []).append(component)
    return {role: several if len(several) > 1 else several[0] for role, several in found.items()}


def parse_quantizations(items: Sequence[str] | None) -> dict[str, dict[str, Any]] | None:
    """Configurations by role. Raises typer.BadParameter for what names no backend."""
    found: dict[str, dict[str, Any]] = {}
    for item in items or ():
        role, _, text = item.partition("=")
        backend, _, arguments = text.partition(":")
        if not role.isidentifier() or not backend:
            raise typer.BadParameter(f"{item!r} is not of the form ROLE=BACKEND.", param_hint="--quantize")
        given = parse_assignments([each for each in arguments.split(",") if each], "--quantize")
        found[role] = {"quant_method": backend, **given}
    return found or None


def check_writable(path: Path) -> None:
    """Raises typer.BadParameter before work is done whose result could not be kept."""
    if not path.parent.is_dir():
        raise typer.BadParameter(f"The directory {path.parent} does not exist.", param_hint="--output")
