"""Tiny checkpoints of every family that can be built without a network."""

from . import (
    audio,
    cogview,
    deepfloyd,
    flux,
    flux_2,
    glm,
    kandinsky,
    kolors,
    pixart,
    qwen,
    qwen_pictures,
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
    flux_2,
    pixart,
    sana,
    cogview,
    kolors,
    qwen,
    qwen_pictures,
    glm,
    audio,
    video,
    wuerstchen,
)
FAMILIES: list[Family] = [family for module in MODULES for family in module.FAMILIES]

# Names that no checkpoint is built for, and why.
NOT_BUILT: dict[str, str] = {
    "cosmos3-omni": "It is mapped to conditions of any kind, for which there is no task here.",
}
