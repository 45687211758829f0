"""Tiny checkpoints of every family that can be built without a network."""

from . import (
    audio,
    cogview,
    deepfloyd,
    flux,
    glm,
    kandinsky,
    kolors,
    pixart,
    qwen,
    sana,
    stable_diffusion,
    stable_diffusion_3,
    stable_diffusion_xl,
    video,
    wuerstchen,
)
from .family import Family

MODULES = (
    stable_diffusion,
    stable_diffusion_xl,
    deepfloyd,
    kandinsky,
    stable_diffusion_3,
    flux,
    pixart,
    sana,
    cogview,
    kolors,
    qwen,
    glm,
    audio,
    video,
    wuerstchen,
)
FAMILIES: list[Family] = [family for module in MODULES for family in module.FAMILIES]

_TORCHVISION = "Its processor needs torchvision, which has to come from where torch came from."

# Names that no checkpoint is built for, and why.
NOT_BUILT: dict[str, str] = {
    "cosmos3-omni": "It is mapped to conditions of any kind, for which there is no task here.",
    "flux2": _TORCHVISION,
    "nucleusmoe-image": _TORCHVISION,
    "qwenimage21": _TORCHVISION,
    "qwenimage-edit": _TORCHVISION,
    "qwenimage-edit-plus": _TORCHVISION,
    "qwenimage-layered": _TORCHVISION,
}
