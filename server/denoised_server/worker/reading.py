"""Reading: follows diffusers and transformers from component to component and from tensor to tensor.

They read weights in loops of their own, which say nothing and ask nobody. What they call for each component and each
tensor is where a load tells how far it is, and where it ends at once when it is cancelled.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers.modeling_utils
from denoised_server.messages import LoadProgress
from diffusers.models import model_loading_utils
from diffusers.pipelines import pipeline_utils
from torch import nn

from . import pages, tensors
from .downloads import REPORT_SECONDS
from .parts import Part

COMPONENT = (pipeline_utils, "load_sub_model")
TENSOR = (
    (model_loading_utils, "set_module_tensor_to_device"),
    # Of version 5, and of those before it.
    (getattr(transformers, "core_model_loading", None), "set_param_for_module"),
    (transformers.modeling_utils, "_load_parameter_into_model"),
)
# To ask the system for less costs more than to be without.
SMALL_BYTES = 1 << 16


class Reading:
    """Of one load, on the thread that enters it: others may read meanwhile, for what else they are asked."""

    def __init__(
        self,
        found: list[Part],
        shared_bytes: int,
        progress: Callable[[LoadProgress], None],
        check_cancelled: Callable[[], None],
    ) -> None:
        self._bytes = {part.role: part.memory_bytes for part in found}
        self._progress, self._check_cancelled = progress, check_cancelled
        self.total_bytes, self._done = sum({part.digest: part.memory_bytes for part in found}.values()), shared_bytes
        self._role, self._came, self._told = "", 0, -math.inf
        self._thread = 0
        wrapped = [(*COMPONENT, self._load)] + [(*each, self._set) for each in TENSOR]
        self._originals = [
            (module, name, getattr(module, name), wrapper) for module, name, wrapper in wrapped if hasattr(module, name)
        ]

    def over(self, role: str, load: Callable[[], Any]) -> Any:
        """Loads one component and reports it; returns when its weights are in memory."""
        self._role, self._came, self._told = role, 0, -math.inf
        self._tell(0)
        loaded = load()
        if isinstance(loaded, nn.Module):
            pages.bring(tensors.of(loaded), lambda _: self._check_cancelled())
        self._done = min(self._done + self._bytes.get(role, 0), self.total_bytes)
        self._came = 0
        return loaded

    def __enter__(self) -> None:
        self._thread = threading.get_ident()
        for module, name, original, wrapper in self._originals:
            setattr(module, name, partial(wrapper, original))

    def __exit__(self, *_: object) -> None:
        for module, name, original, _ in self._originals:
            setattr(module, name, original)

    def _load(self, original: Callable[..., Any], *args: Any, name: str = "", **kwargs: Any) -> Any:
        load = partial(original, *args, name=name, **kwargs)
        return self.over(name, load) if threading.get_ident() == self._thread else load()

    def _set(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around giving a module one of its tensors."""
        if threading.get_ident() == self._thread:
            for each in (*args, *kwargs.values()):
                if type(each) in (torch.Tensor, nn.Parameter) and not each.is_meta:
                    if each.nbytes > SMALL_BYTES:
                        pages.bring([each], self._tell)
                    else:
                        self._tell(each.nbytes)
        return original(*args, **kwargs)

    def _tell(self, came: int) -> None:
        self._check_cancelled()
        # A file may have more than the component takes of it.
        self._came = min(self._came + came, self._bytes.get(self._role, 0))
        if (now := time.monotonic()) - self._told >= REPORT_SECONDS:
            self._told = now
            done = min(self._done + self._came, self.total_bytes)
            self._progress(LoadProgress("reading weights", self._role, done, self.total_bytes))
