"""Connections that are lost: what was under way is joined, not begun again."""

from __future__ import annotations

from pathlib import Path

from denoised import Client
from denoised.v1 import pipeline_service_pb2 as pb

from tests.faults.proxy import Proxy
from tests.faults.victim import Victim


def test_a_load_whose_connection_is_lost_is_joined(tmp_path: Path) -> None:
    reports: list[int] = []
    with Victim(tmp_path) as victim, Proxy(victim.target) as proxy:

        def report(progress: pb.LoadProgress) -> None:
            reports.append(progress.completed_bytes)
            if len(reports) == 2:
                proxy.drop()

        with Client(proxy.target, progress_bar=False, timeout=60.0) as client:
            pipe = client.load("slow", on_progress=report)
            assert [one.name for one in client.pipelines()] == [pipe.name]
    assert len(reports) > 2
    assert reports == sorted(reports), "the same load went on"
