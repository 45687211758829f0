"""The Envoy example: a real Envoy before two real daemons. `make envoy` installs it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import denoised
import pytest
import yaml

from tests import tools
from tests.daemon import Daemon
from tests.tools import ROOT

pytestmark = [pytest.mark.tools, tools.needs("envoy", target="envoy")]


@pytest.fixture
def daemons(tmp_path: Path) -> Iterator[list[Daemon]]:
    with Daemon(tmp_path / "a") as one, Daemon(tmp_path / "b") as other:
        yield [one, other]


@pytest.fixture
def envoy(daemons: list[Daemon], tmp_path: Path) -> Iterator[str]:
    """Its address. The example as it is, but for addresses and ports."""
    config: dict[str, Any] = yaml.safe_load((ROOT / "deploy" / "envoy" / "envoy.yaml").read_text())
    port, admin = tools.free_port(), tools.free_port()
    config["admin"]["address"]["socket_address"]["port_value"] = admin
    resources = config["static_resources"]
    resources["listeners"][0]["address"]["socket_address"] = {"address": "127.0.0.1", "port_value": port}
    cluster = resources["clusters"][0]
    (group,) = cluster["load_assignment"]["endpoints"]
    group["lb_endpoints"] = [
        {"endpoint": {"address": {"socket_address": {"address": host, "port_value": int(number)}}}}
        for host, number in (daemon.target.split(":") for daemon in daemons)
    ]
    file = tmp_path / "envoy.yaml"
    file.write_text(yaml.safe_dump(config))
    tools.run("envoy", "--mode", "validate", "--config-path", file)
    process = tools.start(
        ["envoy", "--config-path", file, "--concurrency", "1", "--disable-hot-restart"], tmp_path / "envoy.log"
    )
    target = f"127.0.0.1:{port}"

    def is_up() -> bool:
        with denoised.Client(target, progress_bar=False, timeout=5) as client:
            try:
                return client.is_serving()
            except denoised.DenoisedError:
                return False

    try:
        tools.wait_until(is_up)
        yield target
    finally:
        process.terminate()
        process.wait(10)


def test_a_client_stays_with_its_daemon_and_finds_another_when_that_is_lost(envoy: str, daemons: list[Daemon]) -> None:
    options: dict[str, Any] = {"progress_bar": False, "timeout": 60.0, "token": "painter"}
    with denoised.Client(envoy, **options) as client:
        name = client.load("demo", task="text-to-image").name
    for _ in range(6):
        # A connection of its own each time: not the connection sticks, the client does.
        with denoised.Client(envoy, **options) as client:
            assert client.pipeline(name)("red apple", num_inference_steps=2, seed=1).images
    (home,) = [daemon for daemon in daemons if daemon.metric("denoised_images_total") == 6]
    (other,) = [daemon for daemon in daemons if daemon is not home]
    assert other.metric("denoised_images_total") == 0

    with denoised.Fleet([envoy], **options) as fleet:
        pipe = fleet.load("demo", task="text-to-image")
        assert pipe("red apple", num_inference_steps=2).images
        home.process.kill()
        home.process.wait(10)

        def is_noticed() -> bool:
            with denoised.Client(envoy, **options) as client:
                try:
                    return client.is_serving() and not client.pipelines()
                except denoised.DenoisedError:
                    return False

        tools.wait_until(is_noticed)
        # PIPELINE_NOT_FOUND at the other one, which builds it from what the client holds.
        assert pipe("red apple", num_inference_steps=2).images
    assert other.metric("denoised_images_total") == 1


def test_different_clients_are_spread(envoy: str, daemons: list[Daemon]) -> None:
    for number in range(12):
        with denoised.Client(envoy, progress_bar=False, token=f"client-{number}") as client:
            client.pipelines()
    counts = [daemon.metric_of("denoised_requests_total", method="ListPipelines") for daemon in daemons]
    assert sum(counts) == 12
    assert min(counts) > 0
