"""The table of parameters in the docs is what the code does."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from denoised import parameters
from diffusers import AutoPipelineForText2Image

PAGE = Path(__file__).parents[2] / "docs" / "from_pretrained.md"
OURS = {"ttl", "pipeline_id", "request_id", "shared", "pinned", "keep_alive", "timeout", "client"}


def table() -> dict[str, str]:
    """What becomes of each parameter, by its name."""
    rows = re.findall(r"^\| (`[^|]+`) \| (used|ignored|refused) \|", PAGE.read_text(), re.MULTILINE)
    return {name: treatment for names, treatment in rows for name in re.findall(r"`(\w+)`", names)}


def test_the_table_lists_exactly_the_parameters_that_there_are() -> None:
    known = {
        "pretrained_model_or_path": "used",
        **dict.fromkeys(set(parameters.LOAD_ARGUMENTS) - OURS, "used"),
        **dict.fromkeys(parameters.IGNORED, "ignored"),
        **dict.fromkeys(parameters.REFUSED, "refused"),
    }
    assert table() == known


def test_every_parameter_that_diffusers_documents_is_in_the_table() -> None:
    text = inspect.getdoc(AutoPipelineForText2Image.from_pretrained) or ""
    documented = set(re.findall(r"^ *(\w+) ?\(`", text, re.MULTILINE)) - {"kwargs"}
    assert "output_loading_info" in documented
    assert documented <= set(table())


def test_our_own_are_named() -> None:
    page = PAGE.read_text()
    assert all(f"`{name}`" in page for name in OURS)
