"""Several daemons as one: spread by load, and rebuilt where one is lost."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import denoised
import numpy as np
import pytest
from denoised import targets
from PIL import Image

from tests.certificates import Authority
from tests.daemon import Daemon


@pytest.fixture
def daemons(tmp_path: Path) -> Iterator[list[Daemon]]:
    with Daemon(tmp_path / "a") as one, Daemon(tmp_path / "b") as other:
        yield [one, other]


def test_pipelines_are_spread_and_outlive_their_daemon(daemons: list[Daemon]) -> None:
    names = [daemon.target for daemon in daemons]
    with denoised.Fleet(names, progress_bar=False, timeout=60.0) as fleet:
        first, second = (fleet.load("demo", task="text-to-image") for _ in range(2))
        homes = [pipe.settle().client.target for pipe in (first, second)]
        assert sorted(homes) == sorted(names), "one each"
        editor = first.derive("image-to-image")
        assert editor.settle().client.target == homes[0]
        arguments = {"image": Image.new("RGB", (128, 128), "red"), "num_inference_steps": 4, "seed": 1}
        before = np.asarray(editor("tangerine", **arguments).images[0])
        (lost,) = [daemon for daemon in daemons if daemon.target == homes[0]]
        lost.process.send_signal(signal.SIGKILL)
        lost.process.wait(10)
        after = np.asarray(editor("tangerine", **arguments).images[0])
        np.testing.assert_array_equal(after, before)
        assert editor.settle().client.target == homes[1]
        # The load and the derivation were done again; what was only a step on the way is not held.
        with denoised.Client(homes[1], progress_bar=False) as client:
            assert sorted(pipe.task for pipe in client.pipelines()) == ["image-to-image", "text-to-image"]
        editor.unload()
        first.unload()
        second.unload()


def test_a_handle_that_is_gone_is_made_again_where_it_was(daemons: list[Daemon]) -> None:
    with denoised.Fleet(daemons[0].target, progress_bar=False, timeout=60.0) as fleet:
        pipe = fleet.load("demo", task="text-to-image")
        with daemons[0].client() as client:
            client.unload(pipe.settle().name)
        assert pipe("red apple", num_inference_steps=2).images


def test_a_fleet_of_which_nobody_answers_is_one_error() -> None:
    with (
        denoised.Fleet(["127.0.0.1:1", "127.0.0.1:2"], progress_bar=False, timeout=2.0) as fleet,
        pytest.raises(denoised.DaemonUnreachableError, match="No daemon of the fleet"),
    ):
        fleet.load("demo")


def test_certificates_are_for_the_name_whose_addresses_are_used(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "ca.pem")
    cert, key = authority.issue(tmp_path, "server", host="localhost")
    with Daemon(tmp_path / "state", "--tls-cert", str(cert), "--tls-key", str(key)) as daemon:
        port = daemon.target.rpartition(":")[2]
        options = {"ca": authority.path, "progress_bar": False, "timeout": 60.0}
        with denoised.Fleet(f"dns:///localhost:{port}", **options) as fleet:
            pipe = fleet.load("demo", task="text-to-image")
            assert pipe.settle().client.target == daemon.target, "an address, not the name"
            assert pipe("red apple", num_inference_steps=2).images
        # The certificate says nothing of the address itself.
        with daemon.client(ca=authority.path) as client, pytest.raises(denoised.DaemonUnreachableError):
            client.server_info()
        with daemon.client(ca=authority.path, server_name="localhost") as client:
            assert client.server_info().version


def test_names_stand_for_addresses() -> None:
    assert targets.addresses("dns:///localhost:7") in (["127.0.0.1:7"], ["127.0.0.1:7", "[::1]:7"], ["[::1]:7"])
    assert targets.addresses("one:1, two") == ["one:1", "two:50051"]
    assert targets.addresses(["one"]) == ["one:50051"]
    assert targets.server_name("dns:///painter.example:7") == "painter.example"
    assert targets.server_name("painter.example:7") is None
    assert targets.server_name(["painter.example:7"]) is None
    with pytest.raises(denoised.DaemonUnreachableError):
        targets.addresses("dns:///no-such-name.invalid:1")
