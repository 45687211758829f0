"""What unit tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def local(sd_checkpoint: Path) -> Any:
    """In this process, what drivers load as a pipeline in a worker."""
    # Not on top: most unit tests are over before diffusers is imported.
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(sd_checkpoint)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
