"""Makes the virtual environments of the servers that we compare with; torch and diffusers are those of this one.

python -m tests.benchmarks.peers        # what `make peers` does
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from tests.benchmarks.servers import ENVIRONMENTS

PACKAGES = {"bentoml": "bentoml", "litserve": "litserve", "pytriton": "nvidia-pytriton", "ray": "ray[serve]"}
# It brings its own libpython, which runs with the standard library of a system's Python only.
SYSTEM_PYTHON = {"pytriton": Path("/usr/bin/python3")}


def main() -> None:
    for name, package in PACKAGES.items():
        folder = ENVIRONMENTS / name
        if folder.exists():
            continue
        system = SYSTEM_PYTHON.get(name)
        interpreter = str(system) if system is not None and system.exists() else sys.executable
        subprocess.run([interpreter, "-m", "venv", "--without-pip", str(folder)], check=True)
        (site,) = folder.glob("lib/python3*/site-packages")
        (site / "base.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
        done = subprocess.run([str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", package])
        if done.returncode:
            shutil.rmtree(folder)
            print(f"{name}: cannot be installed here")


if __name__ == "__main__":
    main()
