"""The image: built from its Dockerfile as it stands, and run as it is to be run. `make image` installs what that takes.

Without a container daemon: buildah builds it, and it runs in a mount namespace of its own, as its user, on a root file
system that cannot be written. In place of the base image of a registry there is one of Debian's own packages.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import denoised
import pytest

from tests import demo_pictures, tools
from tests.tools import ROOT

TOOLS = ROOT / ".tools"
# Layers of earlier builds are used again.
BUILDAH = ("buildah", "--root", str(TOOLS / "containers"), "--runroot", "/run/denoised-containers")
BASE, IMAGE = "localhost/python:bookworm", "localhost/denoised:cpu"
CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
VOLUMES = ("/var/lib/denoised", "/var/cache/huggingface")
ENTER = """
set -eu
root=$1 volumes=$2; shift 2
mount --bind "$root" "$root"
for path in /var/lib/denoised /var/cache/huggingface; do mount --bind "$volumes$path" "$root$path"; done
mount -t tmpfs tmpfs "$root/tmp"; mount -t proc proc "$root/proc"; mount --rbind /dev "$root/dev"
mount -o remount,bind,ro "$root"
exec chroot --userspec=10001:10001 --groups= "$root" env -i "$@"
"""

# Of hadolint: Debian keeps no old versions; the stages' names hide the versions of what is below them; layers are apart
# on purpose; and an empty option is to vanish.
ACCEPTED = ("DL3006", "DL3008", "DL3059", "SC2086")

pytestmark = pytest.mark.tools
# The first of them builds it.
may_build = pytest.mark.timeout(3600)


def package_settings() -> dict[str, str]:
    """Where pip of this machine finds packages: the build reaches them in the same way."""
    printed = tools.run("python3", "-m", "pip", "config", "list")
    return dict(re.findall(r"^\S+\.(index-url|find-links)='(.*)'$", printed, re.MULTILINE))


@tools.needs("hadolint", target="image")
def test_the_dockerfile_is_as_hadolint_wants_it() -> None:
    ignored = [option for rule in ACCEPTED for option in ("--ignore", rule)]
    assert tools.run("hadolint", *ignored, "deploy/docker/Dockerfile") == ""


@tools.needs("dclint", target="image")
def test_the_compose_files_fit_the_schema_of_compose(tmp_path: Path) -> None:
    def mistakes(folder: Path) -> list[str]:
        done = subprocess.run(
            ["dclint", "--formatter", "json", folder],
            env=os.environ | {"PATH": tools.PATH},
            capture_output=True,
            text=True,
        )
        found = json.loads(done.stdout)
        assert len(found) == len([*folder.glob("compose*.yaml")])
        return [str(each) for file in found for each in file["messages"] if each["rule"] == "invalid-schema"]

    assert mistakes(ROOT / "deploy" / "docker") == []
    wrong = (ROOT / "deploy" / "docker" / "compose.yaml").read_text().replace("restart:", "restarted:")
    (tmp_path / "compose.yaml").write_text(wrong)
    assert mistakes(tmp_path)


@pytest.fixture(scope="module")
def image() -> str:
    if os.geteuid() or not (TOOLS / "base").is_dir() or shutil.which("buildah") is None:
        pytest.skip("needs root, buildah and a base; `make image` installs them")
    settings = package_settings()
    base = TOOLS / "base"
    (base / CERTIFICATES[1:]).write_bytes(Path(CERTIFICATES).read_bytes())
    lines = [f"{name} = {value}" for name, value in {"cert": CERTIFICATES, **settings}.items()]
    (base / "etc" / "pip.conf").write_text("\n".join(["[global]", *lines, ""]))
    if subprocess.run([*BUILDAH, "inspect", "--type", "image", BASE], capture_output=True).returncode:
        (TOOLS / "base.dockerfile").write_text("FROM scratch\nCOPY base/ /\n")
        tools.run(*BUILDAH, "bud", "--quiet", "--file", TOOLS / "base.dockerfile", "--tag", BASE, TOOLS, timeout=600)
    folders = [value for value in settings.values() if Path(value).is_dir()]
    mounts = [option for folder in folders for option in ("--volume", f"{folder}:{folder}:ro")]
    # This machine's packages have torch for the CPU already where they say so.
    index = ["--build-arg", "CPU_INDEX="] if "find-links" in settings else []
    arguments = ["--build-arg", "VARIANT=cpu", "--build-arg", f"PYTHON_IMAGE={BASE}", *index]
    tools.run(
        *(*BUILDAH, "bud", "--layers", "--format", "docker", "--isolation", "chroot", *mounts, *arguments),
        *("--file", "deploy/docker/Dockerfile", "--ignorefile", "deploy/docker/Dockerfile.dockerignore"),
        *("--tag", IMAGE, "."),
        timeout=3000,
    )
    return IMAGE


@pytest.fixture(scope="module")
def config(image: str) -> dict[str, Any]:
    """What container engines read of it."""
    found: dict[str, Any] = json.loads(tools.run(*BUILDAH, "inspect", "--type", "image", image))["Docker"]["config"]
    return found


@pytest.fixture(scope="module")
def root(image: str) -> Iterator[Path]:
    container = tools.run(*BUILDAH, "from", image).strip()
    try:
        yield Path(tools.run(*BUILDAH, "mount", container).strip())
    finally:
        tools.run(*BUILDAH, "umount", container)
        tools.run(*BUILDAH, "rm", container)


class Container:
    """Runs commands in the image, with its environment and `variables`, its volumes in a folder."""

    def __init__(self, root: Path, config: dict[str, Any], folder: Path) -> None:
        for volume in VOLUMES:
            path = folder / volume[1:]
            path.mkdir(parents=True)
            os.chown(path, 10001, 10001)
        self._enter = ["unshare", "--mount", "bash", "-c", ENTER, "enter", str(root), str(folder)]
        self._environment = list(config["Env"])

    def start(self, *command: str, **variables: str) -> subprocess.Popen[str]:
        given = [*self._environment, *(f"{name}={value}" for name, value in variables.items())]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return subprocess.Popen([*self._enter, *given, *command], text=True, **streams)  # type: ignore[call-overload,no-any-return]

    def run(self, *command: str, **variables: str) -> tuple[int, str]:
        process = self.start(*command, **variables)
        printed, _ = process.communicate(timeout=60)
        return process.returncode, printed


@pytest.fixture
def container(root: Path, config: dict[str, Any], tmp_path: Path) -> Container:
    return Container(root, config, tmp_path)


@may_build
def test_engines_are_told_how_to_run_it(config: dict[str, Any]) -> None:
    assert config["User"] == "10001:10001"
    assert (config["Entrypoint"], config["Cmd"]) == (["denoised"], ["serve"])
    assert config["Healthcheck"]["Test"] == ["CMD", "denoised", "health"]
    assert config["StopSignal"] == "SIGTERM"
    assert set(config["Volumes"]) == set(VOLUMES)
    assert set(config["ExposedPorts"]) == {"50051/tcp", "9464/tcp"}


@may_build
def test_it_has_what_was_tested_and_nothing_that_builds(container: Container) -> None:
    code, printed = container.run("/opt/denoised/bin/pip", "list", "--format", "freeze")
    assert code == 0, printed
    installed = dict(re.findall(r"^([\w.-]+)==(\S+?)(?:\+\w+)?$", printed.lower().replace("_", "-"), re.MULTILINE))
    constraints = (ROOT / "deploy" / "constraints.txt").read_text().lower().replace("_", "-")
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)$", constraints, re.MULTILINE))
    ours = {name: version for name, version in installed.items() if name not in ("pip", "setuptools", "denoised")}
    assert {"torch", "diffusers", "opentelemetry-sdk"} <= set(ours)
    assert {name: pinned.get(name) for name in ours} == ours
    assert not {"pytest", "mypy", "hatchling"} & set(installed)


@may_build
def test_it_can_write_nothing_but_its_volumes(container: Container) -> None:
    code, printed = container.run(
        "sh", "-c", "id -u; touch /tmp/a /var/lib/denoised/a /var/cache/huggingface/a && echo ok"
    )
    assert (code, printed.split()) == (0, ["10001", "ok"])
    code, printed = container.run("touch", "/opt/denoised/a")
    assert code != 0
    assert "Read-only file system" in printed


@may_build
def test_it_serves_until_it_is_told_to_stop(container: Container, config: dict[str, Any]) -> None:
    port, metrics = tools.free_port(), tools.free_port()
    variables = {
        "DENOISED_ADDRESS": f"127.0.0.1:{port}",
        "DENOISED_METRICS_ADDRESS": f"127.0.0.1:{metrics}",
        "DENOISED_DEVICE": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    target = {"DENOISED_TARGET": f"localhost:{port}"}
    command = [*config["Entrypoint"], *config["Cmd"]]
    process = container.start(*command, **variables)
    try:
        with denoised.Client(f"127.0.0.1:{port}", progress_bar=False, timeout=60) as client:

            def is_serving() -> bool:
                with suppress(denoised.DaemonUnreachableError):
                    return client.is_serving()
                return False

            tools.wait_until(is_serving, timeout=60)
            assert container.run(*config["Healthcheck"]["Test"][1:], **target) == (0, "serving\n")
            image = client.load("demo", task="text-to-image")("red apple", num_inference_steps=12, seed=1).images[0]
            assert demo_pictures.nearest(image, demo_pictures.pictures()) == "red apple"
    finally:
        process.send_signal(getattr(signal, config["StopSignal"]))
        printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0, printed
    assert container.run(*config["Healthcheck"]["Test"][1:], **target)[0] == 1


@may_build
def test_beyond_its_machine_it_does_not_serve_without_tls_unless_it_is_told_to(container: Container) -> None:
    # As the image is: on every address, and nobody has said anything of TLS.
    code, printed = container.run("denoised", "serve")
    assert code == 2
    assert "there is no TLS" in printed
