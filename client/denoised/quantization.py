"""Quantisation as `from_pretrained` is given it, as data."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any

from .errors import InvalidFieldError
from .spec import suggest
from .v1 import artifact_pb2
from .values import Plain, to_proto

FIELD = "quantization_config"
# Of diffusers' PipelineQuantizationConfig, whose objects are known by having them all.
PARAMETERS = ("quant_backend", "quant_kwargs", "components_to_quantize", "quant_mapping")
EXAMPLE = "Give a PipelineQuantizationConfig, a dict of its arguments, or a dict of configurations by component."


def fields(config: Any) -> dict[str, artifact_pb2.Value]:
    """Arguments of a PipelineQuantizationConfig: from one, from a dict of them, or of configurations by component.

    Raises:
        InvalidFieldError: It is none of these, or holds what cannot be sent.
    """
    if config is None:
        return {}
    if all(hasattr(config, name) for name in PARAMETERS):
        given = {name: getattr(config, name) for name in PARAMETERS}
    elif isinstance(config, Mapping) and config:
        given = dict(config) if set(PARAMETERS) & set(config) else {"quant_mapping": config}
    else:
        raise InvalidFieldError.of(FIELD, f"a {type(config).__name__} names no components to quantise.", hint=EXAMPLE)
    mapping = given.get("quant_mapping")
    if isinstance(mapping, Mapping):
        given["quant_mapping"] = {str(role): _configuration(str(role), each) for role, each in mapping.items()}
    # PipelineQuantizationConfig makes an empty dict of arguments that were not given.
    sent = {name: value for name, value in given.items() if value is not None and value != {}}
    return {str(name): _value(str(name), value) for name, value in sent.items()}


def _configuration(role: str, config: Any) -> Mapping[str, Any]:
    data = config.to_dict() if hasattr(config, "to_dict") else config
    if not isinstance(data, Mapping):
        raise InvalidFieldError.of(
            FIELD, f"{role}: a {type(config).__name__} is no configuration.", hint=suggest(role, PARAMETERS) or EXAMPLE
        )
    return data


def _value(name: str, value: Any) -> artifact_pb2.Value:
    try:
        return to_proto(_plain(value))
    except (TypeError, OverflowError) as error:
        raise InvalidFieldError.of(FIELD, f"{name}: {error}.", hint="Send numbers, texts, lists and dicts.") from None


def _plain(value: Any) -> Plain:
    match value:
        case enum.Enum():
            return _plain(value.value)
        case Mapping():
            return {str(key): _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case None | bool() | int() | float() | str():
            return value
    # torch.float16 says "torch.float16"; asking it so needs no torch.
    if str(value).startswith("torch."):
        return str(value).removeprefix("torch.")
    raise TypeError(f"a {type(value).__name__} cannot be sent to the daemon")
