"""The README's code, run as it stands. The demo checkpoint is in the place of the Hub's Stable Diffusion."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from denoised_server.demo import CHECKPOINT

from tests.daemon import Daemon

README = (Path(__file__).parents[2] / "README.md").read_text()
HUB_NAME = "stable-diffusion-v1-5/stable-diffusion-v1-5"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


@pytest.fixture
def environment(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    monkeypatch.setenv("DENOISED_TARGET", daemon.target)
    return dict(os.environ)


def test_the_python_blocks_run_in_their_order(
    environment: dict[str, str], checkpoint_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in = checkpoint_dir / "stable-diffusion-v1-5"
    stand_in.symlink_to(CHECKPOINT)
    torch.set_num_threads(1)
    namespace = {"__name__": "readme"}
    first, *others = blocks("python")
    assert len(others) == 3
    # diffusers itself is told the element type that it falls back to elsewhere.
    exec(first.replace(f'"{HUB_NAME}"', f'"{stand_in}", torch_dtype=__import__("torch").float32'), dict(namespace))
    for block in others:
        exec(block.replace(HUB_NAME, str(stand_in)), namespace)
    assert "pipelines/" in capsys.readouterr().out


def test_both_halves_of_the_comparison_are_the_same_but_for_the_import() -> None:
    local, remote, *_ = blocks("python")
    strip = re.compile(r"\s*#.*")
    differing = [
        (ours, theirs)
        for ours, theirs in zip(remote.splitlines(), local.splitlines(), strict=True)
        if strip.sub("", ours) != strip.sub("", theirs)
    ]
    assert [ours for ours, _ in differing] == [theirs.replace("diffusers", "denoised") for _, theirs in differing]
    assert len(differing) == 1


def test_the_shell_block_runs(environment: dict[str, str], tmp_path: Path) -> None:
    (block,) = blocks("bash")
    bin_dir = Path(sys.executable).parent
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block],
        cwd=tmp_path,
        env=environment | {"PATH": f"{bin_dir}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "tangerine.png").stat().st_size > 500


def test_the_named_targets_and_files_exist() -> None:
    root = Path(__file__).parents[2]
    targets = set(re.findall(r"^([a-z]+):", (root / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"^make ([a-z]+)", README, re.MULTILINE)) <= targets
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (root / link).exists(), link


def test_every_metric_that_is_named_is_served(daemon: Daemon) -> None:
    table = README[README.index("## Metrics") : README.index("## Other languages")]
    served = {key.partition("{")[0] for key in daemon.metrics()}
    for name in re.findall(r"`(denoised_\w+)`", table):
        assert name in served or f"{name}_count" in served, name
