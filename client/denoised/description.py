"""What is known about a pipeline, told to people and programs."""

from __future__ import annotations

import functools
import html
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from . import config
from .component import Component
from .config import FrozenDict
from .spec import TASK_NAMES, dtype_name
from .units import format_bytes
from .v1 import pipeline_service_pb2 as pb

# Methods of a VAE of diffusers that are features of its pipeline here, and what each sets.
SWITCHES: dict[str, tuple[str, dict[str, float] | None]] = {
    "enable_tiling": ("vae_tiling", {}),
    "disable_tiling": ("vae_tiling", None),
    "enable_slicing": ("vae_slicing", {}),
    "disable_slicing": ("vae_slicing", None),
}
RESIDENCIES = {pb.RESIDENCY_DEVICE: "device", pb.RESIDENCY_HOST: "host", pb.RESIDENCY_DISK: "disk"}


@dataclass(frozen=True, slots=True, repr=False)
class LiveComponent(Component):
    """One part of a live pipeline. Given to another pipeline's `from_pretrained` or `from_pipe`, it shares its memory.

    A VAE has `enable_tiling`, `enable_slicing` and what undoes them, for this pipeline alone.

    Attributes:
        pipeline: The pipeline, "pipelines/{id}".
        role: Its role, such as "unet"; "controlnet[1]" for the second of several in one role.
        class_name: Its class, such as "UNet2DConditionModel".
        digest: Identity of its content; empty for parts without weights.
        weight_bytes: Size of its weights; 0 for parts without weights.
        dtype: Element type of its weights, such as "float16"; empty for parts without weights.
        sharers: Pipelines that use this one copy, this pipeline included.
        residency: Where its weights are: "device", "host" or "disk"; empty for parts without weights.
        config: Its configuration; empty for a part that has none.
        switch: Sets a feature of the pipeline.
    """

    digest: str = ""
    weight_bytes: int = 0
    sharers: int = 0
    residency: str = ""
    config: FrozenDict = field(default_factory=FrozenDict)
    switch: Callable[[str, dict[str, float] | None], Any] | None = field(default=None, repr=False, compare=False)

    def __getattr__(self, name: str) -> Any:
        if name in SWITCHES and self.role == "vae" and self.switch is not None:
            return functools.partial(self.switch, *SWITCHES[name])
        raise AttributeError(f"A remote component has no {name!r}.", name=name, obj=self)


@dataclass(frozen=True, slots=True)
class Memory:
    """Weights of a pipeline, in bytes.

    Attributes:
        exclusive_bytes: What goes away with this pipeline.
        shared_bytes: What other pipelines use as well.
        device_bytes: What is on the device now.
        host_bytes: What is in the host's memory now, and comes back from there.
        disk_bytes: What is only on disk now, and is read again at its next use.
    """

    exclusive_bytes: int
    shared_bytes: int
    device_bytes: int = 0
    host_bytes: int = 0
    disk_bytes: int = 0


def describe_components(
    info: pb.Pipeline, switch: Callable[[str, dict[str, float] | None], Any] | None = None
) -> dict[str, LiveComponent]:
    return {
        part.role: LiveComponent(
            pipeline=info.name,
            role=part.role,
            class_name=part.class_name,
            digest=part.digest,
            weight_bytes=part.weight_bytes,
            dtype=dtype_name(part.dtype),
            sharers=part.sharer_count,
            residency=RESIDENCIES.get(part.residency, ""),
            config=config.of_component(info, part.role),
            switch=switch,
        )
        for part in info.components
    }


def describe_memory(info: pb.Pipeline) -> Memory:
    return Memory(info.exclusive_bytes, info.shared_bytes, info.device_bytes, info.host_bytes, info.disk_bytes)


@functools.cache
def named_class(base: Any, name: str) -> Any:
    """A class like the base, of another name; the base itself for none."""
    if not name.isidentifier() or base.__name__ == name:
        return base
    return type(name, (base,), {"__slots__": (), "__module__": base.__module__, "__doc__": base.__doc__})


def is_settable(kind: type, name: str) -> bool:
    """Whether the class says what an assignment to the attribute does."""
    found = getattr(kind, name, None)
    return isinstance(found, property) and found.fset is not None


def task_name(info: pb.Pipeline) -> str:
    return TASK_NAMES.get(info.task, "")


def torch_dtype(info: pb.Pipeline) -> Any:
    """The torch.dtype of the weights, or its name where torch is not in use."""
    name = _dtype_name(info)
    torch = sys.modules.get("torch")
    return name if torch is None else getattr(torch, name)


def _dtype_name(info: pb.Pipeline) -> str:
    if not info.spec.auto_dtype:
        return dtype_name(info.spec.dtype) or "float32"
    # As diffusers says it: that of the first component.
    return next((dtype_name(part.dtype) for part in info.components if part.dtype), "float32")


def torch_device(device: str) -> Any:
    """The torch.device, or its name where torch is not in use."""
    torch = sys.modules.get("torch")
    return device if torch is None else torch.device(device)


def moves(args: tuple[Any, ...], info: pb.Pipeline, device: str) -> list[str]:
    """What `.to(...)` asks for that is not so already, in words."""
    asked = []
    for arg in args:
        # A torch.dtype says "torch.float16", a torch.device and its name "cuda:0".
        text = str(arg)
        if text.startswith("torch."):
            if text.removeprefix("torch.") != _dtype_name(info):
                asked.append(f"dtype {text}: name it in from_pretrained")
        elif arg is not None and device and text.split(":")[0] != device.split(":")[0]:
            asked.append(f"device {text}: the daemon runs it on {device}")
    return asked


def as_text(info: pb.Pipeline, target: str) -> str:
    task = task_name(info) or "its own task"
    total = format_bytes(info.exclusive_bytes + info.shared_bytes)
    return (
        f"<{info.pipeline_class} {info.name} at {target}: {task}, {len(info.components)} components, "
        f"{total} of weights ({format_bytes(info.shared_bytes)} shared)>"
    )


def as_html(info: pb.Pipeline, target: str) -> str:
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in _row(part)) + "</tr>"
        for part in describe_components(info).values()
    )
    heads = "".join(f"<th>{head}</th>" for head in ("component", "class", "weights", "dtype", "used by"))
    return f"<p><code>{html.escape(as_text(info, target))}</code></p><table><tr>{heads}</tr>{rows}</table>"


def _row(part: LiveComponent) -> tuple[str, ...]:
    if not part.weight_bytes:
        return part.role, part.class_name, "", "", ""
    return part.role, part.class_name, format_bytes(part.weight_bytes), part.dtype, f"{part.sharers}"
