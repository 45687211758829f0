"""Diffusers' methods for adapters: which parts of a pipeline each changes, how it is called, and what it leaves."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from denoised.errors import AdapterMismatchError
from denoised_server.messages import LoadedAdapter
from diffusers import DiffusionPipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .adaptation import IP_ADAPTER, LORA, TEXTUAL_INVERSION, Adaptation, Step
from .twins import own_weights


class LoRA(nn.Module):
    """Weights of one LoRA, as a component that the store counts."""


class FusedLoRA(nn.Module):
    """Weights that LoRAs were fused into, or out of."""


class TextualInversion(nn.Module):
    """Token embeddings of a text encoder, with some of its own."""


class IPAdapter(nn.Module):
    """Weights of one or several IP-Adapters."""


CONTAINERS: Mapping[str, type[nn.Module]] = {
    **dict.fromkeys(LORA, FusedLoRA),
    **dict.fromkeys(TEXTUAL_INVERSION, TextualInversion),
    **dict.fromkeys(IP_ADAPTER, IPAdapter),
    "load_lora_weights": LoRA,
}
# Methods that write into weights that are there already.
MERGING = frozenset({"fuse_lora", "unfuse_lora", "disable_lora"})


def family(pipeline: DiffusionPipeline, step: Step) -> str:
    """Equal for pipelines that the step does the same to. Raises AdapterMismatchError for one that lacks the method."""
    method = getattr(type(pipeline), step.method, None)
    if method is None:
        raise AdapterMismatchError(
            f"A {type(pipeline).__name__} has no {step.method}.", hint="diffusers offers no such adapters for it."
        )
    return str(method.__qualname__)


def roles(pipeline: DiffusionPipeline, step: Step) -> list[str]:
    """The parts that the step may change."""
    if step.method in LORA:
        named = getattr(pipeline, "_lora_loadable_modules", ())
    elif step.method in TEXTUAL_INVERSION:
        named = (step.arguments.get("tokenizer", "tokenizer"), step.arguments.get("text_encoder", "text_encoder"))
    else:
        named = ("unet", "transformer")
    return [role for role in named if getattr(pipeline, role, None) is not None]


def encoder_folder(pipeline: DiffusionPipeline, step: Step) -> str | None:
    """Where the image encoder is that the step needs; None when it needs none."""
    if step.method != "load_ip_adapter" or getattr(pipeline, "image_encoder", None) is not None:
        return None
    folder = step.arguments.get("image_encoder_folder", "image_encoder")
    return None if folder is None else str(folder)


def planned_bytes(pipeline: DiffusionPipeline, step: Step, modules: Mapping[str, nn.Module]) -> int:
    """How many bytes of weights the step may add."""
    copied = [
        parameter.nbytes
        for role, module in modules.items()
        for name, parameter in module.named_parameters()
        if name in _written(pipeline, step, role, module)
    ]
    return sum(file.size for file in step.files) + sum(copied)


def run(pipeline: DiffusionPipeline, step: Step) -> None:
    """Makes the call, on a pipeline whose parts are twins."""
    for role in roles(pipeline, step):
        module = getattr(pipeline, role)
        if isinstance(module, nn.Module):
            own_weights(module, _written(pipeline, step, role, module))
    arguments = dict(step.arguments)
    for role in ("tokenizer", "text_encoder"):
        if role in arguments:
            arguments[role] = getattr(pipeline, arguments[role])
    folders, names = [str(file.path.parent) for file in step.files], [file.path.name for file in step.files]
    match step.method:
        case "load_lora_weights":
            pipeline.load_lora_weights(
                folders[0], weight_name=names[0], adapter_name=step.name, local_files_only=True, **arguments
            )
        case "load_textual_inversion":
            pipeline.load_textual_inversion(folders[0], weight_name=names[0], local_files_only=True, **arguments)
        case "load_ip_adapter":
            # The image encoder is a component like others and there already.
            pipeline.load_ip_adapter(
                folders,
                subfolder=[""] * len(names),
                weight_name=names,
                image_encoder_folder=None,
                local_files_only=True,
            )
        case method:
            getattr(pipeline, method)(**arguments)


def changes(pipeline: DiffusionPipeline, step: Step, parts: Mapping[str, Any]) -> dict[str, Any]:
    """What the call left that is not what was there before. Raises AdapterMismatchError when that is nothing."""
    changed = {role: getattr(pipeline, role) for role in parts}
    if step.method == "load_lora_weights":
        changed = {role: part for role, part in changed.items() if step.name in getattr(part, "peft_config", {})}
        if not changed:
            raise AdapterMismatchError(
                f"The adapter has no weights for {' or '.join(parts)} of a {type(pipeline).__name__}.",
                hint="It was made for another family of models.",
            )
    elif step.method in LORA:
        changed = {role: part for role, part in changed.items() if _has_layers(parts[role])}
    elif step.method in IP_ADAPTER:
        changed |= {name: getattr(pipeline, name, None) for name in ("image_encoder", "feature_extractor")}
    return changed


def loaded_adapters(pipeline: DiffusionPipeline, adaptation: Adaptation) -> tuple[LoadedAdapter, ...]:
    """The LoRAs of a pipeline as its user knows them."""
    if not adaptation.loras:
        return ()
    active = pipeline.get_active_adapters()
    listed = pipeline.get_list_adapters()
    return tuple(
        LoadedAdapter(
            lora.name,
            lora.source,
            lora.file.digest,
            tuple(role for role, names in listed.items() if lora.content in names),
            lora.content in active,
        )
        for lora in adaptation.loras
    )


def writes_quantised(pipeline: DiffusionPipeline, step: Step, role: str, module: nn.Module) -> bool:
    """Whether the call would write into weights that are quantised.

    quanto's take nothing in, and nothing says so; torchao's would be quantised a second time.
    """
    written = _written(pipeline, step, role, module)
    return any(
        is_traceable_wrapper_subclass(parameter) for name, parameter in module.named_parameters() if name in written
    )


def _has_layers(module: nn.Module) -> bool:
    return any(isinstance(part, BaseTunerLayer) for part in module.modules())


def _is_merged(module: nn.Module) -> bool:
    return any(isinstance(part, BaseTunerLayer) and part.merged for part in module.modules())


def _written(pipeline: DiffusionPipeline, step: Step, role: str, module: nn.Module) -> set[str]:
    """Names of the weights that the call writes into."""
    if step.method in TEXTUAL_INVERSION:
        embeddings = module.get_input_embeddings().weight  # type: ignore[operator]
        return {name for name, parameter in module.named_parameters() if parameter is embeddings}
    if step.method not in MERGING or role not in _components(pipeline, step):
        return set()
    if step.method != "fuse_lora" and not _is_merged(module):
        return set()
    return {name for name, _ in module.named_parameters() if ".base_layer." in name}


def _components(pipeline: DiffusionPipeline, step: Step) -> list[str]:
    """Roles that the call is for: those named, or those that diffusers takes when none is."""
    given = step.arguments.get("components")
    method = getattr(type(pipeline), step.method)
    default = inspect.signature(method).parameters.get("components")
    return list(given or (default.default if default is not None else None) or roles(pipeline, step))
