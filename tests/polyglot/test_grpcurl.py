"""The grpcurl lines of protos/README.md, run as they stand."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.daemon import Daemon

README = (Path(__file__).parents[2] / "protos" / "README.md").read_text()
PATH = f"{Path(__file__).parents[2] / '.tools' / 'bin'}:{os.environ['PATH']}"

pytestmark = [
    pytest.mark.tools,
    pytest.mark.skipif(
        shutil.which("grpcurl", path=PATH) is None, reason="grpcurl is not installed; `make polyglot` does it"
    ),
]


def test_the_lines_of_the_readme_work_through_reflection(daemon: Daemon) -> None:
    (block,) = re.findall(r"^```bash\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block],
        env=os.environ | {"PATH": PATH, "DENOISED_TARGET": daemon.target},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    for expected in ("denoised.v1.PipelineService", "SERVING", '"completed_steps": 8', '"artifact"', '"freed_bytes"'):
        assert expected in done.stdout, expected
