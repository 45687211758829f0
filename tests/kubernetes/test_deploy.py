"""The rest of deploy/: image, compose file, unit and the commands of its README."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from tests import tools
from tests.daemon import Daemon
from tests.tools import ROOT

DEPLOY = ROOT / "deploy"
README = (DEPLOY / "README.md").read_text()
DOCKERFILE = (DEPLOY / "docker" / "Dockerfile").read_text()


def blocks() -> list[str]:
    return re.findall(r"^```bash\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


@pytest.mark.tools
@tools.needs("helm", target="kubernetes")
@tools.needs("promtool", target="monitoring")
@pytest.mark.parametrize("block", blocks(), ids=lambda block: block.split("\n")[0][:40])
def test_the_commands_of_the_readme_work(block: str, daemon: Daemon, tmp_path: Path) -> None:
    (tmp_path / "deploy").symlink_to(DEPLOY)
    state = tmp_path / "denoised"
    (state / "some").mkdir(parents=True)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block],
        cwd=tmp_path,
        env=os.environ
        | {
            "PATH": f"{Path(sys.executable).parent}:{tools.PATH}",
            "DENOISED_TARGET": daemon.target,
            "STATE_DIR": str(state),
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.tools
@tools.needs("helm", target="kubernetes")
def test_the_chart_installs_by_the_command_of_the_readme(tmp_path: Path) -> None:
    (command,) = re.findall(r"^helm install .*$", README, re.MULTILINE)
    (tmp_path / "deploy").symlink_to(DEPLOY)
    shutil.copy(DEPLOY / "helm" / "denoised" / "ci" / "pools.yaml", tmp_path / "my-values.yaml")
    # As far as it goes without a cluster.
    printed = tools.run("bash", "-euc", f"{command} --dry-run=client", folder=tmp_path)
    assert "painter-denoised-headless.pictures.svc.cluster.local" in printed.partition("NOTES:")[2]


def test_the_workflow_asks_for_targets_that_there_are() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    asked = {step["run"].removeprefix("make ") for job in jobs.values() for step in job["steps"] if "run" in step}
    asked = {each for each in asked if re.fullmatch(r"[a-z]+", each)} | set(
        jobs["tools"]["strategy"]["matrix"]["target"]
    )
    assert {"check", "test", "polyglot", "monitoring", "kubernetes", "envoy"} <= asked <= targets


def test_its_links_lead_somewhere() -> None:
    for page in (DEPLOY / "README.md", *DEPLOY.glob("*/README.md"), *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\(([^)#:]+)[^)]*\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page}: {link}"


def test_the_image_is_not_root_and_copies_what_is_there() -> None:
    stages = DOCKERFILE.split("\nFROM ")
    last = stages[-1]
    assert re.search(r"^USER 10001:10001$", last, re.MULTILINE)
    assert last.index("\nUSER ") < last.index("\nENTRYPOINT ")
    assert re.search(r'^HEALTHCHECK .* CMD \["denoised", "health"\]$', last, re.MULTILINE)
    assert "STOPSIGNAL SIGTERM" in last
    for image in re.findall(r"^ARG \w+_IMAGE=(\S+)$", DOCKERFILE, re.MULTILINE):
        assert re.search(r":\d+\.\d+\.\d+", image), f"{image} is not pinned"
    sources = re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE)
    ignored = (DEPLOY / "docker" / "Dockerfile.dockerignore").read_text()
    for source in " ".join(sources).split():
        assert (ROOT / source).exists(), source
        assert re.search(rf"^!{source}", ignored, re.MULTILINE), f"{source} does not reach the build"


def pins(name: str) -> dict[str, str]:
    """The versions in a file of deploy/, by the packages' names."""
    found = re.findall(r"^([\w.-]+)==([^\s\\]+)", (DEPLOY / name).read_text(), re.MULTILINE)
    return {package.lower().replace("_", "-"): version for package, version in found}


def test_the_image_installs_every_library_at_the_version_that_is_tested() -> None:
    constraints, lock = pins("constraints.txt"), pins("requirements.lock")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["server"], *extras["otel"]]
    names = {re.split(r"[\[>=<~ ]", requirement)[0].lower().replace("_", "-") for requirement in wanted}
    # Which torch is right depends on the device.
    assert names - {"torch"} <= set(lock), "run `make lock`"
    assert "torch" in constraints
    assert {package: constraints.get(package) for package in lock} == lock, "run `make lock`"


def test_compose_mounts_what_is_there_and_keeps_the_daemon_inside() -> None:
    compose = yaml.safe_load((DEPLOY / "docker" / "compose.yaml").read_text())
    daemon = compose["services"]["denoised"]
    assert daemon["read_only"] is True
    assert daemon["cap_drop"] == ["ALL"]
    for name, service in compose["services"].items():
        for port in service["ports"]:
            assert port.startswith("127.0.0.1:"), f"{name} is open to others"
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert (DEPLOY / "docker" / source).exists() if "/" in source else source in compose["volumes"], volume
    image = compose["services"]["prometheus"]["image"]
    assert re.search(r":v?\d+\.\d+\.\d+$", image)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not there")
def test_the_unit_is_valid_and_hardened(tmp_path: Path) -> None:
    unit = tmp_path / "denoised.service"
    text = (DEPLOY / "systemd" / "denoised.service").read_text()
    unit.write_text(text.replace("/opt/denoised/bin/denoised", str(Path(sys.executable).parent / "denoised")))
    checked = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    assert "denoised.service" not in checked.stderr, checked.stderr
    rated = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=25", unit], capture_output=True, text=True
    )
    assert rated.returncode == 0, rated.stdout[-500:]
