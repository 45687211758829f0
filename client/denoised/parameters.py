"""Arguments of `from_pretrained` and `from_pipe`: which reach the daemon, which change nothing, which cannot work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .errors import InvalidFieldError
from .spec import suggest

# Named as diffusers names them, with what they are called in `Client.load`.
RENAMED = {"torch_dtype": "dtype", "token": "hub_token"}
LOAD_ARGUMENTS = (
    "torch_dtype", "dtype", "variant", "revision", "subfolder", "use_safetensors", "token", "local_files_only",
    "force_download", "quantization_config", "ttl", "pipeline_id", "request_id", "shared", "pinned",
    "keep_alive", "timeout",
)  # fmt: skip
DERIVE_ARGUMENTS = (
    "token", "local_files_only", "force_download", "ttl", "pipeline_id", "request_id", "shared", "pinned",
    "keep_alive", "timeout",
)  # fmt: skip
# Arguments that steer how this process would read files. The daemon reads them, so ignoring these changes nothing about
# the pipeline.
IGNORED: Mapping[str, str] = {
    "cache_dir": "The daemon has a cache of its own: set HF_HUB_CACHE where it runs.",
    "low_cpu_mem_usage": "The daemon loads without a second copy in memory.",
    "mirror": "Set HF_ENDPOINT where the daemon runs. diffusers does not use it either.",
    "offload_state_dict": "The daemon loads without a second copy in memory.",
    "resume_download": "Downloads whose connection breaks are always resumed.",
}
# Arguments that would change something and cannot; harmless only with the values given, for the reason given.
REFUSED: Mapping[str, tuple[tuple[object, ...], str]] = {
    "custom_pipeline": ((None,), "The daemon runs diffusers' own classes only."),
    "custom_revision": ((None, "main"), "The daemon runs diffusers' own classes only."),
    "device_map": ((None,), "The daemon decides which device holds the weights."),
    "from_flax": ((None, False), "Convert the weights to safetensors."),
    "max_memory": ((None,), "Memory budgets are settings of the daemon."),
    "offload_folder": ((None,), "The daemon decides where weights are kept."),
    "output_loading_info": ((None, False), "diffusers' pipelines report no missing and unexpected keys either."),
    "proxies": ((None,), "Set HTTPS_PROXY where the daemon runs."),
    "trust_remote_code": ((None, False), "The daemon runs diffusers' own classes only."),
    "use_auth_token": ((None, False), "Send it as `token`."),
}


def split_load_arguments(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `from_pretrained` was given, as arguments of `Client.load` and as overrides.

    Raises:
        InvalidFieldError: An argument cannot work with a daemon, or its name looks like a slip.
    """
    return _split(arguments, LOAD_ARGUMENTS)


def split_derive_arguments(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `from_pipe` was given, as arguments of `Client.derive` and as overrides. Raises as for loading."""
    for name in ("torch_dtype", "dtype"):
        if arguments.get(name) is not None:
            raise InvalidFieldError.of(
                name, "a derived pipeline shares the weights of its source.", hint="Load the checkpoint again instead."
            )
    kept = {key: arguments[key] for key in arguments if key not in ("torch_dtype", "dtype")}
    return _split(kept, DERIVE_ARGUMENTS)


def _split(arguments: Mapping[str, Any], known: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    settings: dict[str, Any] = {}
    replaced: dict[str, Any] = {}
    for name, value in arguments.items():
        if name in known:
            settings[name] = value
        elif name in REFUSED:
            harmless, reason = REFUSED[name]
            if not any(value is allowed or value == allowed for allowed in harmless):
                raise InvalidFieldError.of(name, f"{value!r} has no meaning for a daemon.", hint=reason)
        elif name not in IGNORED:
            # Roles are an open set that only the daemon knows: a near miss is refused here, the rest there.
            if hint := suggest(name, [*known, *REFUSED, *IGNORED], cutoff=0.8):
                raise InvalidFieldError.of(name, "there is no such argument.", hint=hint)
            replaced[name] = value
    return _checked(settings), replaced


def _checked(given: Mapping[str, Any]) -> dict[str, Any]:
    """By the names that `Client` has for them, without what says nothing."""
    settings = dict(given)
    # True and False ask for the login of this machine or for none, and the daemon has one of its own.
    if settings.get("token") in (None, True, False):
        settings.pop("token", None)
    for name in ("variant", "revision", "subfolder", "token", "pipeline_id", "request_id"):
        if settings.get(name, "") is None:
            del settings[name]
        elif not isinstance(settings.get(name, ""), str):
            shown = type(settings[name]).__name__ if name == "token" else repr(settings[name])
            raise InvalidFieldError.of(name, f"{shown} is no text.", hint="Write it in quotes.")
    for name in ("local_files_only", "force_download"):
        if name in settings:
            settings[name] = bool(settings[name])
    if settings.get("dtype") is not None:
        settings.pop("torch_dtype", None)
    elif "torch_dtype" in settings:
        settings.pop("dtype", None)
    return {RENAMED.get(name, name): value for name, value in settings.items()}
