"""Preloads: pipelines that the daemon is to have before it is ready, as its configuration names them."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from denoised.spec import DTYPE_ALIASES, TASKS, WEIGHT_DTYPES, suggest
from denoised.values import Artifact, Plain
from PIL import Image

from .arguments import MAX_PRIORITY
from .handles import ID, PREFIX
from .messages import Generate, Parameter, Spec

# A side that every family can make: a multiple of all their factors.
TRIAL_SIDE = 256
# What a trial asks for, of the parameters that a pipeline has. Two steps: with one, some noise schedulers divide by 0;
# nine frames: families want a multiple of four or eight and one more.
TRIAL: Mapping[str, Plain] = {
    "prompt": "a red apple",
    "height": TRIAL_SIDE,
    "width": TRIAL_SIDE,
    "num_inference_steps": 2,
    "num_frames": 9,
    "strength": 1.0,
}
TRIAL_PICTURES = ("image", "mask_image")
FIELDS = ("repo", "id", "task", "dtype", "revision", "variant")


@dataclass(frozen=True, slots=True)
class Preload:
    """A pipeline that the configuration declares, and its name."""

    name: str
    spec: Spec


def to_text(given: object) -> str:
    """What names one preload, a text or a table, as text: `REPO,id=ID,task=TASK`. Raises ValueError."""
    if isinstance(given, Mapping):
        fields = {str(name): str(value) for name, value in given.items() if value not in (None, "")}
        given = ",".join((fields.pop("repo", ""), *(f"{name}={value}" for name, value in fields.items())))
    if not isinstance(given, str):
        raise ValueError(f"{given!r} is no preload; write REPO,id=ID,task=TASK")
    parse(given)
    return given


def parse(text: str) -> Preload:
    """Raises ValueError for what names no pipeline."""
    repo, *options = (part.strip() for part in text.split(","))
    fields = {"repo": repo}
    for option in options:
        name, found, value = option.partition("=")
        if not found or name not in FIELDS or name in fields:
            raise ValueError(f"{option!r} in {text!r} is none of {', '.join(f'{name}=…' for name in FIELDS[1:])}")
        fields[name] = value
    if not repo:
        raise ValueError(f"{text!r} names no repository")
    task, dtype = fields.get("task", ""), fields.get("dtype", "float32")
    dtype = DTYPE_ALIASES.get(dtype, dtype)
    if task and task not in TASKS:
        raise ValueError(f"{task!r} in {text!r} is no task; {suggest(task, [*TASKS]) or ', '.join(TASKS)}")
    if dtype not in (*WEIGHT_DTYPES, "auto"):
        raise ValueError(f"{dtype!r} in {text!r} is no element type; take auto or {', '.join(WEIGHT_DTYPES)}")
    chosen = fields.get("id") or _id(repo)
    if not ID.fullmatch(chosen):
        raise ValueError(f"{chosen!r} in {text!r} is no id: lower-case letters, digits and hyphens, a letter first")
    spec = Spec(repo, fields.get("revision", ""), fields.get("variant", ""), task, dtype)
    return Preload(PREFIX + chosen, spec)


def _id(repo: str) -> str:
    """The last part of a repository's name, in the letters that an id may have."""
    name = re.sub(r"[^a-z0-9]+", "-", repo.rstrip("/").rpartition("/")[2].lower()).strip("-")
    return (name if name[:1].isalpha() else f"p-{name}")[:63]


def trial(name: str, parameters: Iterable[Parameter]) -> Generate:
    """A small generation, which shows whether a pipeline with these parameters works."""
    known = {parameter.name for parameter in parameters}
    arguments = {name: value for name, value in TRIAL.items() if name in known}
    arguments |= {name: _picture() for name in TRIAL_PICTURES if name in known}
    return Generate(name, arguments, seeds=(0,), output_type="np", priority=MAX_PRIORITY)


def _picture() -> Artifact:
    data = io.BytesIO()
    Image.new("RGB", (TRIAL_SIDE, TRIAL_SIDE), "white").save(data, "PNG")
    return Artifact("image/png", data.getvalue())
