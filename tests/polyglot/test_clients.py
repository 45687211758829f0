"""The clients in other languages, built and run against a live daemon. `make polyglot` installs what they need."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import demo_pictures
from tests.certificates import Authority
from tests.daemon import Daemon

pytestmark = pytest.mark.tools
CLIENT = Path(__file__).parents[2] / "client"


@dataclass(frozen=True)
class Language:
    """How its client is built and run, in its folder, and what that takes."""

    needs: tuple[str, ...]
    build: tuple[Sequence[str], ...]
    run: tuple[str, ...]


LANGUAGES = {
    "go": Language(needs=("go", "protoc", "make"), build=(["make"],), run=("build/painter",)),
    "typescript": Language(
        needs=("npm", "node"),
        build=(["npm", "ci", "--no-audit", "--no-fund"], ["npm", "run", "build"]),
        run=("node", "build/painter/src/painter.js"),
    ),
    "cpp": Language(
        needs=("g++", "protoc", "grpc_cpp_plugin", "pkg-config", "make"),
        build=(["make", "-j2"],),
        run=("build/painter",),
    ),
}


def missing(needs: Sequence[str]) -> str:
    absent = [tool for tool in needs if shutil.which(tool) is None]
    return f"{', '.join(absent)} is not installed; `make polyglot` does it" if absent else ""


def run(command: Sequence[str], folder: Path, **variables: str) -> str:
    done = subprocess.run(command, cwd=folder, env=os.environ | variables, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(params=LANGUAGES)
def painter(request: pytest.FixtureRequest) -> tuple[tuple[str, ...], Path]:
    """The command of a language's client, and its folder."""
    language = LANGUAGES[request.param]
    if reason := missing(language.needs):
        pytest.skip(reason)
    folder = CLIENT / request.param
    for command in language.build:
        run(command, folder)
    return language.run, folder


def test_each_client_paints_cancels_and_reads_an_error(
    daemon: Daemon, painter: tuple[tuple[str, ...], Path], tmp_path: Path
) -> None:
    command, folder = painter
    cancelled = daemon.metric_of("denoised_requests_total", method="Generate", outcome="cancelled")
    printed = run([*command, daemon.target, str(tmp_path)], folder)
    assert re.search(r"^loaded pipelines/painter-\w+: StableDiffusionPipeline$", printed, re.MULTILINE)
    assert re.search(r"^derived pipelines/editor-\w+: 0 bytes of its own", printed, re.MULTILINE)
    assert "\nstep 12 of 12\n" in printed
    assert "\ncancelled\n" in printed
    assert "refused: UNKNOWN_ARGUMENT" in printed
    assert daemon.metric_of("denoised_requests_total", method="Generate", outcome="cancelled") == cancelled + 1
    known = demo_pictures.pictures()
    for name, caption in (("apple", "red apple"), ("tangerine", "tangerine")):
        with Image.open(tmp_path / f"{name}.png") as image:
            assert demo_pictures.nearest(image, known) == caption
    with daemon.client() as client:
        assert not [pipe.name for pipe in client.pipelines() if "painter" in pipe.name], "unloaded"
        with client.load("demo", task="text-to-image") as pipe:
            ours = pipe("red apple", num_inference_steps=12, seed=1).images[0]
    with Image.open(tmp_path / "apple.png") as theirs:
        assert np.abs(np.asarray(theirs, dtype=int) - np.asarray(ours, dtype=int)).max() <= 2, "the same as the SDK's"


def test_each_client_speaks_tls_and_has_a_certificate_and_a_token(
    painter: tuple[tuple[str, ...], Path], tmp_path: Path
) -> None:
    command, folder = painter
    authority = Authority(tmp_path / "ca.pem")
    server, shown = authority.issue(tmp_path, "server"), authority.issue(tmp_path, "painter")
    tokens = tmp_path / "tokens.json"
    secret = run([sys.executable, "-m", "denoised", "token", "create", "painter", "--file", str(tokens)], tmp_path)
    options = {"tls-cert": server[0], "tls-key": server[1], "tls-client-ca": authority.path, "tokens-file": tokens}
    with Daemon(tmp_path / "state", *(f"--{name}={path}" for name, path in options.items())) as guarded:
        given = {
            "DENOISED_CA": str(authority.path),
            "DENOISED_CLIENT_CERT": str(shown[0]),
            "DENOISED_CLIENT_KEY": str(shown[1]),
            "DENOISED_TOKEN": secret.strip(),
        }
        run([*command, guarded.target, str(tmp_path)], folder, **given)
        with Image.open(tmp_path / "apple.png") as image:
            assert demo_pictures.nearest(image, demo_pictures.pictures()) == "red apple"
        for missing in ("DENOISED_CA", "DENOISED_TOKEN"):
            done = subprocess.run(
                [*command, guarded.target, str(tmp_path)],
                cwd=folder,
                env=os.environ | given | {missing: ""},
                capture_output=True,
                text=True,
                timeout=120,
            )
            assert done.returncode == 1, missing
            assert ("UNAUTHENTICATED" in done.stderr) == (missing == "DENOISED_TOKEN")


def test_a_client_that_finds_nobody_says_so(painter: tuple[tuple[str, ...], Path], tmp_path: Path) -> None:
    command, folder = painter
    done = subprocess.run(
        [*command, "127.0.0.1:1", str(tmp_path)], cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert done.stderr.strip()
