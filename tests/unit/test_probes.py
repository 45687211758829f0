"""Health: which state is which answer, for which probe."""

from __future__ import annotations

from typing import Any

import pytest
from denoised_server.probes import Health, Standing, answer, judge
from denoised_server.supervision import WorkerState

UP, DOWN, FAILED = WorkerState.ACTIVE, WorkerState.LOST, WorkerState.FAILED
USABLE, COMING, BROKEN = Standing(True), Standing(False), Standing(False, "DAMAGED_WEIGHTS")


@pytest.mark.parametrize(
    ("given", "health"),
    [
        ({"is_started": False, "workers": {"a": WorkerState.STARTING}}, Health.STARTING),
        ({"is_started": False, "workers": {}}, Health.STARTING),
        ({"workers": {"a": UP, "b": UP}}, Health.READY),
        ({"workers": {"a": UP, "b": DOWN}}, Health.DEGRADED),
        ({"workers": {"a": UP, "b": FAILED}}, Health.DEGRADED),
        ({"workers": {"a": DOWN, "b": FAILED}}, Health.FAILING),
        ({"workers": {"a": UP}, "is_draining": True}, Health.DRAINING),
        ({"workers": {"a": WorkerState.DRAINING}}, Health.DRAINING),
        ({"workers": {"a": WorkerState.DRAINING, "b": UP}}, Health.DEGRADED),
        ({"workers": {"a": WorkerState.DRAINING, "b": DOWN}}, Health.FAILING),
        ({"workers": {"a": UP}, "preloads": {"p": USABLE, "q": USABLE}}, Health.READY),
        ({"workers": {"a": UP}, "preloads": {"p": USABLE, "q": COMING}}, Health.DEGRADED),
        ({"workers": {"a": UP}, "preloads": {"p": USABLE, "q": BROKEN}}, Health.DEGRADED),
        ({"workers": {"a": UP}, "preloads": {"p": COMING}}, Health.STARTING),
        ({"workers": {"a": UP}, "preloads": {"p": COMING, "q": BROKEN}}, Health.STARTING),
        ({"workers": {"a": UP}, "preloads": {"p": BROKEN}}, Health.FAILING),
        ({"workers": {"a": DOWN}, "preloads": {"p": COMING}}, Health.FAILING),
    ],
)
def test_how_the_daemon_is(given: dict[str, Any], health: Health) -> None:
    report = judge(**{"is_started": True, "is_draining": False, "preloads": {}, **given})
    assert report.health is health
    assert report.is_serving == (health in (Health.READY, Health.DEGRADED))
    assert health in (Health.READY, Health.DRAINING) or report.reasons or not given["workers"]


@pytest.mark.parametrize(
    ("workers", "is_draining", "statuses"),
    [
        ({"a": UP}, False, (200, 200, 200)),
        ({"a": UP}, True, (200, 503, 200)),
        ({"a": DOWN}, False, (503, 503, 200)),
    ],
)
def test_each_probe_has_its_own_answer(
    workers: dict[str, WorkerState], is_draining: bool, statuses: tuple[int, ...]
) -> None:
    report = judge(is_started=True, is_draining=is_draining, workers=workers, preloads={})
    found = [answer(path, report, has_started=True) for path in ("/healthz", "/readyz", "/startupz")]
    assert tuple(one[0] for one in found if one) == statuses
    assert all(one and one[1].startswith(report.health) for one in found)
    assert answer("/metrics", report, has_started=True) is None


def test_why_a_pipeline_is_not_there_is_said_without_what_its_error_says() -> None:
    report = judge(is_started=True, is_draining=False, workers={"a": UP}, preloads={"pipelines/p": BROKEN})
    assert report.reasons == ("pipelines/p does not work: DAMAGED_WEIGHTS.",)


def test_starting_is_alive_and_not_ready() -> None:
    report = judge(is_started=False, is_draining=False, workers={}, preloads={})
    found = [answer(path, report, has_started=False) for path in ("/healthz", "/readyz", "/startupz")]
    assert [one[0] for one in found if one] == [200, 503, 503]
