"""Writes deploy/requirements.lock: the packages of `denoised[server,otel]`, with the versions of constraints.txt.

torch and what only torch needs are left out, since which build of it is right depends on the device: an image installs
it first, then the lock, which has hashes, with `pip install --no-deps --require-hashes -r deploy/requirements.lock`.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
OF_TORCH = re.compile(r"^(torch|triton|setuptools|nvidia-[a-z0-9-]+|cuda-[a-z]+)==", re.MULTILINE)


def compile_lock(*options: str) -> str:
    command = [
        str(Path(sys.executable).parent / "uv"),
        "pip",
        "compile",
        "pyproject.toml",
        "--extra",
        "server",
        "--extra",
        "otel",
        "--quiet",
    ]
    command += ["--constraint", "deploy/constraints.txt", "--python-version", "3.11", "--no-header", "--no-annotate"]
    command += ["--no-emit-index-url", "--no-emit-find-links", *options]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def main() -> None:
    left_out = [option for name in OF_TORCH.findall(compile_lock()) for option in ("--no-emit-package", name)]
    lock = compile_lock("--generate-hashes", *left_out).partition("\n\n#")[0]
    (ROOT / "deploy" / "requirements.lock").write_text(f"# Written by `make lock`.\n{lock.rstrip()}\n")


if __name__ == "__main__":
    main()
