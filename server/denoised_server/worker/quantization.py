"""Quantises a checkpoint's components while they are read, as diffusers does."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import diffusers
from denoised.errors import InvalidFieldError, QuantizationUnavailableError
from denoised.spec import one_of, suggest
from denoised.values import Plain
from denoised_server import quantization
from diffusers.quantizers import PipelineQuantizationConfig
from diffusers.quantizers import auto as diffusers_quantizers
from diffusers.utils import import_utils
from transformers.quantizers import auto as transformers_quantizers

from . import classes
from .parts import Part
from .quotation import quote

FIELD = "spec.quantization_config"
INSTALLED = {
    "bitsandbytes_4bit": import_utils.is_bitsandbytes_available,
    "bitsandbytes_8bit": import_utils.is_bitsandbytes_available,
    "quanto": import_utils.is_optimum_quanto_available,
    "torchao": import_utils.is_torchao_available,
}


@dataclass(frozen=True, slots=True)
class Quantization:
    """How the parts of a checkpoint are quantised, by role: the data of `denoised_server.quantization.of`."""

    by_role: Mapping[str, Mapping[str, Plain]]

    @classmethod
    def of_parts(cls, config: Mapping[str, Plain], parts: Iterable[Part]) -> Quantization:
        """Raises InvalidFieldError when it names what is no part with weights of the checkpoint."""
        roles = [part.role for part in parts]
        for role in quantization.named(config):
            if role not in roles:
                raise InvalidFieldError.of(
                    FIELD,
                    f"the checkpoint brings no component {role[:80]!r} with weights.",
                    hint=suggest(role, roles) or one_of(roles),
                )
        given = {role: quantization.of(config, role) for role in roles}
        return cls({role: data for role, data in given.items() if data is not None})

    def identify(self, parts: Iterable[Part]) -> list[Part]:
        """The parts with digests that say how they are quantised."""
        return [
            replace(part, digest=_digest(part.digest, self.by_role[part.role])) if part.role in self.by_role else part
            for part in parts
        ]

    def arguments(self, parts: Iterable[Part]) -> dict[str, Any]:
        """What to give `from_pretrained`: nothing when no part is quantised.

        Raises:
            InvalidFieldError: The backend does not take its arguments.
            QuantizationUnavailableError: The backend is not installed or does not run on this machine.
        """
        if not self.by_role:
            return {}
        made = {part.role: _configuration(part, self.by_role[part.role]) for part in parts if part.role in self.by_role}
        return {"quantization_config": PipelineQuantizationConfig(quant_mapping=made)}


def _digest(content: str, data: Mapping[str, Plain]) -> str:
    identity = hashlib.sha256(f"{content}\n{json.dumps(data, sort_keys=True)}\n".encode())
    return f"sha256:{identity.hexdigest()}"


def _configuration(part: Part, data: Mapping[str, Plain]) -> Any:
    """The configuration of the library that the part's class is from, when its backend runs here."""
    field = f"{FIELD}[{part.role}]"
    backend = str(data["quant_method"])
    arguments = {name: value for name, value in data.items() if name != "quant_method"}
    if backend == "gguf":
        raise QuantizationUnavailableError(
            f"{part.role}: gguf is a format of files, and these weights are not in it.",
            hint="Quantise with another backend.",
        )
    if not INSTALLED[backend]():
        raise _unavailable(part, backend, "it is not installed")
    if backend == "quanto" and {data.get("weights_dtype"), data.get("weights")} & {"int4", "int2"}:
        # In the middle of a request, and nobody else's goes on meanwhile.
        raise _unavailable(part, backend, "for less than 8 bits it compiles an extension when it first runs")
    of_diffusers = issubclass(classes.find(part.class_name, field), diffusers.ModelMixin)
    library: Any = diffusers_quantizers if of_diffusers else transformers_quantizers
    kind = library.AUTO_QUANTIZATION_CONFIG_MAPPING[backend]
    quantizer = diffusers_quantizers.DiffusersAutoQuantizer if of_diffusers else transformers_quantizers.AutoHfQuantizer
    try:
        config = kind.from_dict(arguments)
    except Exception as error:
        raise InvalidFieldError.of(field, f"{backend} refuses it: {quote(error)}.", hint=_takes(kind)) from None
    for name in arguments:
        # Some take any argument, and lose those that they do not know.
        if name not in _parameters(kind) and not hasattr(config, name):
            hint = suggest(name, _parameters(kind)) or _takes(kind)
            raise InvalidFieldError.of(field, f"{backend} takes no argument {name[:80]!r} here.", hint=hint)
    try:
        quantizer.from_config(config, pre_quantized=False).validate_environment(device_map=None)
    except Exception as error:
        raise _unavailable(part, backend, quote(error)) from None
    return config


def _parameters(kind: type) -> list[str]:
    parameters = inspect.signature(kind).parameters.values()
    return [each.name for each in parameters if each.kind is not each.VAR_KEYWORD]


def _takes(kind: type) -> str:
    return f"{kind.__name__} of {kind.__module__.partition('.')[0]} takes {', '.join(_parameters(kind))}."


def _unavailable(part: Part, backend: str, reason: str) -> QuantizationUnavailableError:
    return QuantizationUnavailableError(
        f"{part.role} cannot be quantised with {backend} here: {reason}.",
        hint="Install the backend where the daemon runs, or take one that its device has.",
    )
