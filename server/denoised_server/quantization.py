"""How a checkpoint's components are to be quantised: the data of diffusers' PipelineQuantizationConfig, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from denoised.errors import InvalidFieldError
from denoised.spec import one_of, suggest
from denoised.values import Artifact, Plain

PARAMETERS = ("quant_backend", "quant_kwargs", "components_to_quantize", "quant_mapping")
BACKENDS = ("bitsandbytes_4bit", "bitsandbytes_8bit", "gguf", "quanto", "torchao")
# What is shown of a name that the caller made up.
SHOWN = 80


def check(config: Mapping[str, Plain], field: str) -> Mapping[str, Plain]:
    """The data, where diffusers could take it. Raises InvalidFieldError."""
    if not config:
        return {}
    for name, value in config.items():
        if name not in PARAMETERS:
            raise InvalidFieldError.of(
                field, f"{name[:SHOWN]!r} is no argument.", hint=suggest(name, PARAMETERS) or one_of(PARAMETERS)
            )
        if _has_media(value):
            raise InvalidFieldError.of(f"{field}[{name}]", "it has media.", hint="Send numbers, texts and lists.")
    if "quant_mapping" in config:
        _check_mapping(config, field)
        return config
    _check_backend(config.get("quant_backend"), f"{field}[quant_backend]")
    if not isinstance(config.get("quant_kwargs", {}), Mapping):
        raise InvalidFieldError.of(f"{field}[quant_kwargs]", "it is no map.", hint="Name the backend's arguments.")
    roles = config.get("components_to_quantize")
    # One name is a list of one, as for diffusers.
    roles = [roles] if isinstance(roles, str) else roles
    if roles is not None and not (isinstance(roles, Sequence) and all(isinstance(role, str) for role in roles)):
        raise InvalidFieldError.of(
            f"{field}[components_to_quantize]", "it is no list of names.", hint="Name components, such as 'unet'."
        )
    return {**config, "components_to_quantize": roles} if roles is not None else config


def named(config: Mapping[str, Plain]) -> list[str]:
    """The components that it names; without any it is about all that have weights."""
    given = config.get("quant_mapping") or config.get("components_to_quantize")
    return [str(role) for role in given] if isinstance(given, Mapping | Sequence) else []


def of(config: Mapping[str, Plain], role: str) -> dict[str, Plain] | None:
    """How a component is quantised, the same for everything that says the same: its backend as `quant_method`, and
    the backend's arguments. None when it is not."""
    mapping, names = config.get("quant_mapping"), named(config)
    if not config or (names and role not in names):
        return None
    if isinstance(mapping, Mapping):
        given, backend = mapping[role], _backend(mapping[role])
    else:
        given, backend = config.get("quant_kwargs"), config["quant_backend"]
    # With underscores `to_dict` writes down what it made of its own arguments.
    arguments = given.items() if isinstance(given, Mapping) else ()
    kept = {name: value for name, value in arguments if name != "quant_method" and not name.startswith("_")}
    return {**kept, "quant_method": backend}


def _check_mapping(config: Mapping[str, Plain], field: str) -> None:
    mapping = config["quant_mapping"]
    if len(config) > 1:
        raise InvalidFieldError.of(
            field, "quant_mapping stands beside other arguments.", hint="Send it alone, or a quant_backend."
        )
    if not isinstance(mapping, Mapping) or not mapping:
        raise InvalidFieldError.of(
            f"{field}[quant_mapping]", "it is no map with components.", hint="Map each component to its configuration."
        )
    for role, given in mapping.items():
        _check_backend(_backend(given), f"{field}[quant_mapping][{role[:SHOWN]}]")


def _check_backend(backend: Plain, field: str) -> None:
    if not isinstance(backend, str):
        raise InvalidFieldError.of(field, "it names no backend.", hint=one_of(BACKENDS))
    if backend not in BACKENDS:
        raise InvalidFieldError.of(
            field, f"{backend[:SHOWN]!r} is no backend.", hint=suggest(backend, BACKENDS) or one_of(BACKENDS)
        )


def _backend(given: Plain) -> Plain:
    if not isinstance(given, Mapping):
        return None
    method = given.get("quant_method")
    # `to_dict` of a BitsAndBytesConfig leaves it to its arguments how many bits are meant.
    if method == "bitsandbytes":
        return "bitsandbytes_4bit" if given.get("load_in_4bit") else "bitsandbytes_8bit"
    return method


def _has_media(value: Plain) -> bool:
    if isinstance(value, Mapping):
        return any(_has_media(item) for item in value.values())
    return isinstance(value, Artifact) or (isinstance(value, list | tuple) and any(map(_has_media, value)))
