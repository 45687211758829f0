"""Lets torchvision be imported beside a torch for the CPU, where only its build for CUDA is to be had.

Its extension cannot be loaded there, and its Python, which is all that processors of pictures use, refuses to be
imported without the extension's operators. They are declared here, without anything behind them. Python imports this
module when it starts, in daemons too, where the folder is on PYTHONPATH.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Sequence
from typing import Any

OPERATORS = ("nms", "qnms", "roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d")
declared: list[Any] = []


class Declaring(importlib.abc.MetaPathFinder):
    """Declares the operators when torchvision is about to be imported, and leaves finding it to others."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        # Whoever only asks whether it is installed does not import torch for that.
        if name == "torchvision.extension" and not declared:
            import torch

            kind: Any = torch.library.Library
            library = kind("torchvision", "DEF")
            for operator in OPERATORS:
                library.define(f"{operator}(Tensor values) -> Tensor")
                library.define(f"_{operator}_backward(Tensor values) -> Tensor")
            declared.append(library)
        return None


sys.meta_path.insert(0, Declaring())
