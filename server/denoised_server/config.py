"""Settings of the daemon: from flags, then DENOISED_* variables, then a TOML file, then the defaults."""

from __future__ import annotations

import difflib
import json
import os
import re
import sys
import textwrap
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from denoised.channel import is_loopback
from denoised.errors import InvalidFieldError
from denoised.units import to_seconds
from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, InitSettingsSource, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from .preloads import parse, to_text

PREFIX = "DENOISED_"
SIZES = {"": 1, "B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
SIZES |= {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}

# Settings that are bytes, or shares of a memory.
SHARES = ("memory_budget", "host_memory", "working_set", "headroom", "leak_limit")


class SettingsError(Exception):
    """A setting cannot be used; the text says which one, and what to do."""


def _seconds(value: object) -> object:
    try:
        return to_seconds(value, "value") if isinstance(value, str) else value
    except InvalidFieldError as error:
        raise ValueError(f"{value!r} is not a duration; write seconds, or for example 90s, 30m, 24h or 7d") from error


def _bytes(value: object) -> object:
    if not isinstance(value, str):
        return value
    if not (found := re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", value.strip())) or found[2].upper() not in SIZES:
        raise ValueError(f"{value!r} is not a size; write bytes, or for example 64MiB or 1.5GiB")
    return int(float(found[1]) * SIZES[found[2].upper()])


def _budget(value: object) -> object:
    if not isinstance(value, str) or value == "auto":
        return value
    if found := re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", value.strip()):
        return min(float(found[1]) / 100, 1.0)
    return _bytes(value)


def _share_or_bytes(value: int | float | str) -> int | float | str:
    """A share of the device's memory stays a float between 0 and 1; bytes are whole."""
    if isinstance(value, str):
        return value
    if value <= 0:
        raise ValueError("it is not above 0")
    return _share_or_none(value)


def _share_or_none(value: int | float | str) -> int | float | str:
    """As above, and nothing is possible too."""
    if isinstance(value, str):
        return value
    if value < 0:
        raise ValueError("it is below 0")
    return value if isinstance(value, float) and value <= 1 else int(value)


def _address(value: str) -> str:
    host, _, port = value.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65_535:
        raise ValueError(f"{value!r} is not HOST:PORT")
    return value


def _paths(value: object) -> object:
    return [part for part in value.split(os.pathsep) if part] if isinstance(value, str) else value


def _names(value: object) -> object:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _preloads(value: object) -> object:
    items = value.split(";") if isinstance(value, str) else value
    return [to_text(item) for item in items if item != ""] if isinstance(items, list | tuple) else value


def _state_dir() -> Path:
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "denoised"
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "denoised"


Seconds = Annotated[float, BeforeValidator(_seconds)]
Bytes = Annotated[int, BeforeValidator(_bytes)]
Address = Annotated[str, AfterValidator(_address)]
# Empty text is how a TOML file says that there is none.
File = Annotated[Path | None, BeforeValidator(lambda value: None if value == "" else value)]
Auto = Literal["auto"]


class Settings(BaseSettings):
    """Every setting there is."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", env_ignore_empty=True)

    address: Annotated[Address, Field(description="Where to listen, as HOST:PORT; port 0 picks a free one.")] = (
        "127.0.0.1:50051"
    )
    insecure: Annotated[
        bool,
        Field(
            description="Whether to listen beyond this machine without TLS: everybody on the way can then read and "
            "change what is sent, tokens included."
        ),
    ] = False
    tls_cert: Annotated[
        File,
        Field(description="PEM file with the certificate and its chain; turns TLS on. Read again when it changes."),
    ] = None
    tls_key: Annotated[File, Field(description="PEM file with the key of tls_cert. Read again when it changes.")] = None
    tls_client_ca: Annotated[
        File,
        Field(
            description="PEM file with the authorities that sign clients' certificates; a client without one is then "
            "turned away. Read again when it changes."
        ),
    ] = None
    tokens_file: Annotated[
        File,
        Field(
            description="File of tokens, as `denoised token create` writes it; each call must then show one. Read "
            "again when it changes."
        ),
    ] = None
    audit_file: Annotated[
        File,
        Field(
            description="File of the audit log: a JSON object a line for each load, change, unload and refusal, with "
            "the client's name. Without one they are in the log."
        ),
    ] = None
    audit_prompts: Annotated[
        bool, Field(description="Whether the audit log has generations too, with their prompts; otherwise nothing has.")
    ] = False
    metrics_address: Annotated[Address, Field(description="Where Prometheus finds the metrics, as HOST:PORT.")] = (
        "127.0.0.1:9464"
    )
    device: Annotated[
        str, Field(description="Devices to use: auto (all GPUs, else the CPU), cpu, cuda (all GPUs) or cuda:N.")
    ] = "auto"
    workers: Annotated[
        Annotated[int, Field(ge=1, le=256)] | Auto,
        Field(description="Worker processes on the CPU; auto is one. A GPU always has one."),
    ] = "auto"
    threads: Annotated[
        Annotated[int, Field(ge=1, le=4096)] | Auto,
        Field(description="Compute threads of each worker; auto is its share of the cores."),
    ] = "auto"
    allow_dirs: Annotated[
        list[Path],
        NoDecode,
        BeforeValidator(_paths),
        Field(
            description="Directories that pipelines may be loaded from, besides the Hugging Face cache and the "
            "embedded models. In the environment, separated as in PATH."
        ),
    ] = Field(default_factory=list)
    allow_repos: Annotated[
        list[str],
        NoDecode,
        BeforeValidator(_names),
        Field(
            description="Repositories on the Hugging Face Hub that may be loaded, such as black-forest-labs/*; an "
            "empty list allows all of them. In the environment, separated by commas."
        ),
    ] = Field(default_factory=list)
    pinned_revisions: Annotated[
        bool, Field(description="Whether repositories on the Hub are loaded by commit only, never by branch or tag.")
    ] = False
    allow_pickle: Annotated[
        bool,
        Field(
            description="Whether weights may be read from pickled files, which can run code of whoever made them; "
            "otherwise from safetensors files only."
        ),
    ] = False
    preload: Annotated[
        list[str],
        NoDecode,
        BeforeValidator(_preloads),
        Field(
            description="Pipelines that the daemon has before it is ready, pinned and shared with all clients: "
            "REPO,id=ID,task=TASK,dtype=DTYPE,revision=REVISION,variant=VARIANT, all but the repository optional, or "
            "tables with repo and these names. In the environment, separated by semicolons."
        ),
    ] = Field(default_factory=list)
    readiness_probe: Annotated[
        Literal["load", "generate"],
        Field(
            description="What makes a preloaded pipeline count as ready: load (that it is live) or generate (that it "
            "also generates, tried at its start and every 15 seconds while its worker has nothing to do)."
        ),
    ] = "load"
    state_dir: Annotated[Path, Field(description="Directory for what outlives the daemon.")] = Field(
        default_factory=_state_dir
    )
    journal: Annotated[
        Literal["disk", ":memory:"],
        Field(
            description="Where the table of pipelines is kept: disk (in state_dir, so that handles outlive the daemon) "
            "or :memory: (they end with it)."
        ),
    ] = "disk"
    keep_requests: Annotated[
        bool,
        Field(
            description="Whether requests of detached generations, prompts and images included, are kept on disk until "
            "they are done, so that they are run again after a crash."
        ),
    ] = True
    results_ttl: Annotated[
        Seconds, Field(ge=0, description="Seconds that results of detached generations are kept after their end.")
    ] = 86_400
    results_bytes: Annotated[Bytes, Field(ge=0, description="Bytes of results that are kept; the oldest go first.")] = (
        2**30
    )
    embeddings_bytes: Annotated[
        Bytes,
        Field(
            ge=0,
            description="Bytes of what text encoders came to that each device keeps for prompts asked again; 0: none.",
        ),
    ] = 2**26
    embeddings_ttl: Annotated[
        Seconds, Field(ge=0, description="Seconds that what a text encoder came to is kept; 0 keeps none.")
    ] = 600
    memory_budget: Annotated[
        int | float | Auto,
        BeforeValidator(_budget),
        AfterValidator(_share_or_bytes),
        Field(
            description="Memory that weights may take on each device: bytes such as 20GiB, a percentage, or auto for "
            "what working_set and headroom leave."
        ),
    ] = "auto"
    host_memory: Annotated[
        int | float | Auto,
        BeforeValidator(_budget),
        AfterValidator(_share_or_none),
        Field(
            description="Memory of the host for weights that have left a device, from where they are back sooner than "
            "from disk: bytes for each worker, a percentage that all share, or auto for 50% beside GPUs and none on "
            "the CPU."
        ),
    ] = "auto"
    working_set: Annotated[
        int | float,
        BeforeValidator(_budget),
        AfterValidator(_share_or_none),
        Field(
            description="Memory on each device that is for computing and that weights never take: bytes or a "
            "percentage."
        ),
    ] = 0.05
    headroom: Annotated[
        int | float,
        BeforeValidator(_budget),
        AfterValidator(_share_or_none),
        Field(
            description="Memory on each device that nobody is promised, for what cannot be foreseen: bytes or a "
            "percentage."
        ),
    ] = 0.05
    default_ttl: Annotated[
        Seconds, Field(ge=1, description="Seconds that an unused pipeline is kept when its caller does not say.")
    ] = 86_400
    max_ttl: Annotated[Seconds, Field(ge=1, description="Seconds that an unused pipeline is kept at most.")] = 2_592_000
    max_waiting: Annotated[int, Field(ge=0, description="Generations that may wait for one worker.")] = 256
    max_running: Annotated[
        int, Field(ge=1, description="Generations that one worker runs at a time; their calls are joined.")
    ] = 32
    max_joined: Annotated[int, Field(ge=1, description="Generations whose calls may be joined into one batch.")] = 32
    max_message_bytes: Annotated[
        Bytes, Field(ge=2**20, le=2**30 - 1, description="Bytes of the largest request that is taken.")
    ] = 64 * 2**20
    max_pixels: Annotated[
        int, Field(ge=1, description="Pixels of the largest picture: its height times its width.")
    ] = 16_777_216
    callback_timeout: Annotated[
        Seconds,
        Field(gt=0, description="Seconds that a client may take to reply to a callback; then its generation ends."),
    ] = 600
    load_timeout: Annotated[
        Seconds,
        Field(gt=0, description="Seconds that any load may take, besides those that it is given for its bytes."),
    ] = 600
    load_bytes_per_second: Annotated[
        Bytes,
        Field(
            ge=1,
            description="Bytes that a load is expected to download, hash and read in a second at least: one that is "
            "slower, after load_timeout, is ended.",
        ),
    ] = 2_000_000
    log_format: Annotated[
        Literal["text", "json"], Field(description="How log lines are written: text for people, json for machines.")
    ] = "text"
    drain_grace: Annotated[
        Seconds, Field(ge=0, description="Seconds that running generations are given to finish on SIGTERM.")
    ] = 30
    heartbeat_timeout: Annotated[
        Seconds, Field(ge=1, description="Seconds without a sign of life after which a worker is replaced.")
    ] = 30
    step_timeout: Annotated[
        Seconds,
        Field(ge=1, description="Seconds that one batch of component calls may take until its worker is replaced."),
    ] = 900
    leak_limit: Annotated[
        int | float,
        BeforeValidator(_budget),
        AfterValidator(_share_or_none),
        Field(
            description="Memory that a worker may hold beside what is accounted for, until it is started anew the next "
            "time that it has nothing to do: bytes, or a percentage of its device; 0 for any."
        ),
    ] = 0.1
    start_timeout: Annotated[Seconds, Field(gt=0, description="Seconds that a worker may take to come up.")] = 120

    @model_validator(mode="after")
    def _check_preloads(self) -> Self:
        names = Counter(parse(text).name for text in self.preload)
        if twice := [name for name, count in names.items() if count > 1]:
            raise ValueError(f"preload names {', '.join(twice)} twice; give each an id of its own")
        if self.readiness_probe == "generate" and not self.preload:
            raise ValueError("readiness_probe generate needs a preload to generate with")
        return self

    @model_validator(mode="after")
    def _check_network(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key belong together; set both")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError("tls_client_ca needs tls_cert and tls_key")
        if not (is_loopback(self.address) or self.tls_cert or self.insecure):
            raise ValueError(
                f"address {self.address} can be reached from other machines and there is no TLS; set tls_cert and "
                "tls_key, or say --insecure"
            )
        return self

    def to_toml(self) -> str:
        """A file that says the same, each setting under what it means."""
        lines = ["# Settings of denoised. Flags and DENOISED_* variables go before this file."]
        for name, field in type(self).model_fields.items():
            default = _shown(name, field.get_default(call_default_factory=True))
            text = f"{field.description} Default: {default}."
            lines += ["", *textwrap.wrap(text, 118, initial_indent="# ", subsequent_indent="# ")]
            lines.append(f"{name} = {_shown(name, getattr(self, name))}")
        return "\n".join(lines) + "\n"


def read(overrides: Mapping[str, object], file: Path | None) -> Settings:
    """Raises SettingsError for what is unknown, of the wrong type or out of range."""
    values = _read_file(file) if file is not None else {}

    class WithFile(Settings):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return init_settings, env_settings, InitSettingsSource(settings_cls, values)

    _check_names(overrides)
    try:
        return WithFile(**dict[str, Any](overrides))
    except ValidationError as error:
        raise SettingsError(_explain(error)) from None


def _read_file(file: Path) -> dict[str, Any]:
    try:
        values = tomllib.loads(file.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(f"{file} cannot be read as TOML: {error}") from None
    _check_names(values)
    return values


def _check_names(values: Iterable[str]) -> None:
    known = list(Settings.model_fields)
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}?" if near else "`denoised serve --print-config` lists all there are."
            raise SettingsError(f"There is no setting {name}; {hint}")


def _explain(error: ValidationError) -> str:
    reasons: dict[str, list[str]] = {}
    for problem in error.errors():
        text = problem["msg"].removeprefix("Value error, ").removeprefix("Input ")
        # What is wrong with several settings together names them itself.
        reasons.setdefault(str(problem["loc"][0]) if problem["loc"] else "", []).append(text)
    return "; ".join(f"{name}: {' or '.join(texts)}".removeprefix(": ") for name, texts in reasons.items()) + "."


def _shown(name: str, value: object) -> str:
    is_share = name in SHARES and isinstance(value, float)
    return f'"{100 * float(str(value)):g}%"' if is_share else _literal(value)


def _literal(value: object) -> str:
    match value:
        case None:
            return '""'
        case bool():
            return str(value).lower()
        case float() if value.is_integer():
            return str(int(value))
        case int() | float():
            return str(value)
        case list():
            return f"[{', '.join(map(_literal, value))}]"
    return json.dumps(str(value), ensure_ascii=False)
