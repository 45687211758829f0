"""The dashboard and the rules, against a real Prometheus that scrapes a real daemon. `make monitoring` installs it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import denoised
import pytest
import yaml

from tests import tools
from tests.daemon import Daemon
from tests.monitoring.prometheus import MONITORING, Prometheus
from tests.tools import ROOT

RULES = yaml.safe_load((MONITORING / "rules.yaml").read_text())
ALERTS = [rule for group in RULES["groups"] for rule in group["rules"] if "alert" in rule]
RECORDS = [rule["record"] for group in RULES["groups"] for rule in group["rules"] if "record" in rule]
DASHBOARD = json.loads((MONITORING / "dashboard.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]

pytestmark = [pytest.mark.tools, tools.needs("prometheus", "promtool", target="monitoring")]


def work(daemon: Daemon, other: Path) -> None:
    """Some of everything: three tasks at once, an early leaver, a mistake, a refusal, a crash, a lease that ends, and a
    second model for which the first has to make room.
    """
    with daemon.client() as client, ThreadPoolExecutor(8) as threads:
        painter = client.load("demo", task="text-to-image")
        editor = client.derive(painter, "image-to-image")
        picture = painter("red apple", num_inference_steps=4).images[0]
        for _ in range(2):
            jobs = [threads.submit(painter, "rocket", num_inference_steps=10) for _ in range(4)]
            jobs += [threads.submit(editor, "castle", image=picture, num_inference_steps=10) for _ in range(4)]
            refused = [job for job in jobs if isinstance(job.exception(), denoised.errors.QueueFullError)]
        assert refused, "the queue of this daemon is short"
        with pytest.raises(denoised.errors.DeadlineExceededError):
            painter("castle", num_inference_steps=900, timeout=1.0)
        with pytest.raises(denoised.errors.UnknownArgumentError):
            painter(promt="castle")
        with pytest.raises(denoised.errors.RepoNotFoundError):
            client.load("demo-that-is-not-there")
        client.load("demo", ttl=1)
        for pipe in (client.load(other, dtype="float32"), painter):
            pipe("castle", num_inference_steps=2, height=64, width=64)
        (worker,) = client.workers()
        os.kill(worker.pid, signal.SIGKILL)
        tools.wait_until(lambda: client.workers()[0].restart_count == 1)
        painter("rocket", num_inference_steps=10)


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory, sd_checkpoint: Path) -> Iterator[Prometheus]:
    """One that has seen a daemon under load."""
    folder = tmp_path_factory.mktemp("prometheus")
    config = folder / "denoised.toml"
    # The demo model and the other one do not fit at a time.
    config.write_text('max_running = 3\nmax_waiting = 2\nmemory_budget = "34MiB"\n')
    with Daemon(folder / "state", "--config", str(config), allow=[sd_checkpoint]) as daemon:
        target = urllib.parse.urlsplit(daemon.metrics_url).netloc
        running = Prometheus(folder, target)
        try:
            # Rates need what was there before.
            tools.wait_until(lambda: bool(running.query("denoised_build_info")))
            time.sleep(1)
            work(daemon, sd_checkpoint)
            # Until everything was scraped twice and the rules were evaluated.
            stopped = threading.Event()
            stopped.wait(4)
            with urllib.request.urlopen(daemon.metrics_url, timeout=10) as page:
                running.page = page.read()
            yield running
        finally:
            running.stop()


def expressions() -> list[tuple[str, str]]:
    return [(panel["title"], target["expr"]) for panel in PANELS for target in panel["targets"]]


@pytest.mark.parametrize(("title", "expression"), expressions(), ids=lambda value: value[:40])
def test_every_panel_has_data(prometheus: Prometheus, title: str, expression: str) -> None:
    for variable, value in (("$job", ".*"), ("$instance", ".*"), ("$__rate_interval", "1m"), ("$__range", "1m")):
        expression = expression.replace(variable, value)
    found = prometheus.query(expression)
    # A model that nobody has asked yet has no quantile.
    assert any(sample["value"][1] != "NaN" for sample in found), f"{title}: {expression}: {found}"


@pytest.mark.parametrize("record", RECORDS)
def test_every_recording_rule_has_data(prometheus: Prometheus, record: str) -> None:
    assert prometheus.query(record)


def test_every_rule_is_evaluated_without_an_error(prometheus: Prometheus) -> None:
    rules = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
    assert {rule["name"] for rule in rules} == {*RECORDS, *(alert["alert"] for alert in ALERTS)}
    assert [rule for rule in rules if rule["health"] != "ok"] == []


def test_names_units_and_texts_are_as_prometheus_wants_them(prometheus: Prometheus) -> None:
    environment = os.environ | {"PATH": tools.PATH}
    command = ["promtool", "check", "metrics"]
    done = subprocess.run(command, input=prometheus.page, env=environment, capture_output=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, b"")


def test_no_series_holds_what_a_caller_has_sent(prometheus: Prometheus) -> None:
    names = prometheus.get("label/__name__/values")
    assert len([name for name in names if name.startswith("denoised_")]) > 40
    labels = set(prometheus.get("labels")) - {"__name__", "job", "instance", "alertname", "alertstate", "severity"}
    values = {value for label in labels for value in prometheus.get(f"label/{label}/values")}
    assert not [value for value in values if re.search(r"pipelines/|rocket|castle|not-there", value)]
    assert "demo" in values


def test_the_rules_are_valid_and_alerts_fire_when_they_should() -> None:
    tools.run("promtool", "check", "rules", MONITORING / "rules.yaml")
    tools.run("promtool", "test", "rules", "rules_test.yaml", folder=MONITORING)
    tried = {
        each["alertname"]
        for test in yaml.safe_load((MONITORING / "rules_test.yaml").read_text())["tests"]
        for each in test.get("alert_rule_test", [])
        if each.get("exp_alerts")
    }
    assert tried == {alert["alert"] for alert in ALERTS}


def test_every_alert_links_to_a_heading_of_the_runbook() -> None:
    runbook = (ROOT / "docs" / "runbook.md").read_text()
    headings = re.findall(r"^## (\w+)$", runbook, re.MULTILINE)
    assert headings == [alert["alert"] for alert in ALERTS]
    for alert in ALERTS:
        assert alert["annotations"]["runbook_url"] == f"docs/runbook.md#{alert['alert'].lower()}"


def test_the_example_configuration_is_valid() -> None:
    tools.run("promtool", "check", "config", "prometheus.yaml", folder=MONITORING)
