"""What end-to-end tests share beside the daemon."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.daemon import Daemon
from tests.unit.both_sdks import AsyncSdk, BlockingSdk


@pytest.fixture(params=[BlockingSdk(), AsyncSdk()], ids=["sync", "async"])
def sdk(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def held(daemon: Daemon) -> Iterator[Callable[[], int]]:
    """How many bytes of weights the daemon holds: none before the test, and none after it."""
    with daemon.client() as client:
        # Other files of tests use the same daemon, and may have left pipelines in it.
        for pipe in client.pipelines():
            pipe.unload()
        assert client.workers()[0].memory.weight_bytes == 0
        yield lambda: client.workers()[0].memory.weight_bytes
        for pipe in client.pipelines():
            pipe.unload()
        assert client.workers()[0].memory.weight_bytes == 0
