"""Traces that nobody wants cost nothing and get in nobody's way."""

from __future__ import annotations

import subprocess
import sys

import pytest
from denoised import traces

WITHOUT = """
import sys
sys.modules["opentelemetry"] = None
from denoised import Client, traces
assert not traces.IS_INSTALLED
traces.set_up("nobody")()
with traces.calling("Generate") as headers, traces.serving("Generate", ()), traces.span("queue"):
    assert (headers, traces.carry(), traces.trace_id()) == ((), {}, "")
traces.record("denoise", {}, 0.0, 1.0)
"""


def test_all_of_it_does_nothing_without_opentelemetry() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_nothing_is_carried_where_no_exporter_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in traces.VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    traces.set_up("nobody")()
    with traces.calling("Generate") as headers, traces.span("queue"):
        assert (tuple(headers), traces.carry(), traces.trace_id()) == ((), {}, "")


def test_errors_go_through(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyError), traces.calling("Generate"):
        raise KeyError
    with pytest.raises(KeyError), traces.span("queue"):
        raise KeyError
