"""Tiny checkpoints of every family that can be built without a network."""

from . import deepfloyd, kandinsky, stable_diffusion, stable_diffusion_xl
from .family import Family

FAMILIES: list[Family] = [
    *stable_diffusion.FAMILIES,
    *stable_diffusion_xl.FAMILIES,
    *deepfloyd.FAMILIES,
    *kandinsky.FAMILIES,
]

# Names that no checkpoint is built for here, and why.
NOT_BUILT: dict[str, str] = dict.fromkeys(
    (
        "stable-diffusion-3",
        "stable-diffusion-3-pag",
        "hunyuan",
        "hunyuan-pag",
        "stable-diffusion-3-controlnet",
        "wuerstchen",
        "cascade",
        "pixart-alpha",
        "pixart-sigma",
        "sana",
        "sana-pag",
        "pixart-sigma-pag",
        "auraflow",
        "flux",
        "flux-control",
        "flux-controlnet",
        "flux-kontext",
        "flux2-klein",
        "flux2",
        "ideogram4",
        "krea2",
        "lumina",
        "lumina2",
        "chroma",
        "cogview3",
        "cogview4",
        "glm_image",
        "helios",
        "helios-pyramid",
        "cogview4-control",
        "nucleusmoe-image",
        "qwenimage",
        "qwenimage21",
        "qwenimage-controlnet",
        "z-image",
        "z-image-controlnet",
        "z-image-controlnet-inpaint",
        "z-image-omni",
        "ovis",
        "prx",
        "kolors",
        "kolors-pag",
        "qwenimage-edit",
        "qwenimage-edit-plus",
        "qwenimage-layered",
    ),
    "Its checkpoint is not made yet.",
)
