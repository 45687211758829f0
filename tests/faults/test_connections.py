"""Connections that are lost: what was under way is joined, not begun again."""

from __future__ import annotations

from pathlib import Path

import pytest
from denoised import Client
from denoised.v1 import pipeline_service_pb2 as pb

from tests.faults.proxy import Proxy, impatient
from tests.faults.victim import Victim


@pytest.mark.parametrize("how", ["drop", "silence"])
def test_a_load_whose_connection_is_lost_is_joined(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    impatient(monkeypatch)
    reports: list[int] = []
    with Victim(tmp_path) as victim, Proxy(victim.target) as proxy:

        def report(progress: pb.LoadProgress) -> None:
            reports.append(progress.completed_bytes)
            if len(reports) == 1:
                getattr(proxy, how)()

        with Client(proxy.target, progress_bar=False, timeout=60.0) as client:
            pipe = client.load("slow", on_progress=report)
            assert [one.name for one in client.pipelines()] == [pipe.name]
            assert how == "silence" or len(reports) > 2, "it was told of what came meanwhile"
    assert reports == sorted(reports)
    assert len([line for line in victim.log if "is live on" in line]) == 1, "the same load went on"
