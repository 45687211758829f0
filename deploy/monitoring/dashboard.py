"""Writes dashboard.json for Grafana from the table of panels below; `make generate` runs it.

`--check` only says whether what is checked in is what would be written.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("dashboard.json")
WIDTH, HEIGHT, COLUMNS = 8, 8, 24
SELECTOR = 'job=~"$job", instance=~"$instance"'


@dataclass(frozen=True)
class Panel:
    """One graph: its queries with their legends, and a unit as Grafana names it."""

    title: str
    unit: str
    queries: dict[str, str]
    text: str = ""
    kind: str = "timeseries"
    stack: bool = False
    min: float | None = 0
    max: float | None = None


def series(name: str, *labels: str) -> str:
    """A metric of the chosen daemons."""
    return f"denoised_{name}{{{', '.join((SELECTOR, *labels))}}}"


def rate(name: str, *labels: str) -> str:
    return f"rate({series(name, *labels)}[$__rate_interval])"


def quantile(share: float, name: str, *by: str) -> str:
    return f"histogram_quantile({share}, sum by ({', '.join(('le', *by))}) ({rate(name + '_bucket')}))"


def mean(name: str, *by: str) -> str:
    group = f"sum by ({', '.join(by)})" if by else "sum"
    return f"{group} ({rate(name + '_sum')}) / {group} ({rate(name + '_count')})"


def memory(kind: str) -> str:
    return series("device_memory_bytes", f'kind="{kind}"')


WASTED = rate("denoise_steps_total", 'use="wasted"')

ROWS: dict[str, list[Panel]] = {
    "Overview": [
        Panel("Workers up", "none", {series("worker_up"): "{{instance}} {{worker}}"}, kind="stat"),
        Panel("Running", "none", {f"sum({series('num_requests_running')})": "running"}, kind="stat"),
        Panel("Waiting", "none", {f"sum({series('num_requests_waiting')})": "waiting"}, kind="stat"),
        Panel("Images per second", "none", {f"sum({rate('images_total')})": "images"}),
        Panel(
            "Latency, arrival to last output",
            "s",
            {
                quantile(0.5, "e2e_request_latency_seconds"): "p50",
                quantile(0.95, "e2e_request_latency_seconds"): "p95",
            },
        ),
        Panel(
            "Running and waiting",
            "none",
            {
                f"sum({series('num_requests_running')})": "running",
                f"sum({series('num_requests_waiting')})": "waiting",
            },
        ),
        Panel(
            "Where a generation's time goes",
            "s",
            {mean("request_phase_seconds", "phase"): "{{phase}}"},
            "Mean seconds in each phase, of generations that ended well.",
            stack=True,
        ),
        Panel("Calls by outcome", "reqps", {f"sum by (outcome) ({rate('requests_total')}) > 0": "{{outcome}}"}),
        Panel("Build", "none", {series("build_info"): "{{version}}, Python {{python}}"}, kind="stat"),
    ],
    "Memory": [
        Panel(
            "Weights of the budget",
            "percentunit",
            {f"{memory('weight')} / ignoring(kind) {memory('budget')}": "{{instance}} {{worker}}"},
            kind="gauge",
            max=1,
        ),
        Panel(
            "Memory by kind",
            "bytes",
            {
                series("device_memory_bytes", 'kind=~"weight|reserved|working_set|cached|process|free"'): (
                    "{{worker}} {{kind}}"
                )
            },
        ),
        Panel("Weights by residency", "bytes", {f"sum by (residency) ({series('component_bytes')})": "{{residency}}"}),
        Panel("Saved by sharing", "bytes", {series("shared_saved_bytes"): "{{instance}} {{worker}}"}),
        Panel("Pipelines", "none", {f"sum by (state) ({series('pipelines')})": "{{state}}"}, stack=True),
        Panel(
            "Evictions",
            "ops",
            {f"sum by (tier, reason) ({rate('evictions_total')})": "{{tier}}: {{reason}}"},
            "Components that left the device or the host's memory, and why.",
        ),
        Panel(
            "Age at eviction",
            "s",
            {
                quantile(0.1, "eviction_age_seconds"): "p10",
                quantile(0.5, "eviction_age_seconds"): "p50",
            },
            "Since the last use of what was evicted. Seconds mean that components move to and fro.",
        ),
        Panel(
            "Out of memory, and what helped",
            "ops",
            {f"sum by (rung) ({rate('out_of_memory_total')})": "{{rung}}"},
            "Component calls; `none` are generations that failed.",
        ),
        Panel(
            "Taken over estimated",
            "percentunit",
            {
                quantile(0.5, "estimate_ratio", "estimate"): "p50 {{estimate}}",
                quantile(0.95, "estimate_ratio", "estimate"): "p95 {{estimate}}",
            },
            "Weights of loads, and working sets of calls.",
        ),
        Panel(
            "In no book",
            "bytes",
            {memory("unaccounted"): "unaccounted {{worker}}", memory("unreclaimed"): "unreclaimed {{worker}}"},
            "Memory in use while the worker was idle, and weights that were let go of and are still there.",
            min=None,
        ),
        Panel("Time of loads by phase", "s", {f"sum by (phase) ({rate('load_phase_seconds_total')})": "{{phase}}"}),
    ],
    "Engine": [
        Panel(
            "Calls joined",
            "percentunit",
            {
                f"sum by (worker) ({rate('engine_joined_calls_total')}) / "
                f"sum by (worker) ({rate('engine_calls_total')})": "{{worker}}"
            },
            "Share of component calls that ran in one batch with other generations'.",
            max=1,
        ),
        Panel("Calls in a batch", "none", {mean("batch_size", "worker"): "{{worker}}"}, "Mean."),
        Panel(
            "Why joining stopped",
            "ops",
            {f"sum by (reason) ({rate('engine_batch_stops_total')})": "{{reason}}"},
            "Batches: nothing else fitted, `max_joined`, or larger ones were measured not to pay.",
        ),
        Panel("Batches per second", "ops", {f"sum by (worker) ({rate('engine_batches_total')})": "{{worker}}"}),
        Panel(
            "Device time by phase",
            "percentunit",
            {f"sum by (phase) ({rate('engine_device_seconds_total')})": "{{phase}}"},
            "Seconds of device time in each second; one worker has one.",
            stack=True,
        ),
        Panel(
            "Time between steps",
            "s",
            {
                quantile(0.5, "denoise_step_seconds", "worker"): "p50 {{worker}}",
                quantile(0.95, "denoise_step_seconds", "worker"): "p95 {{worker}}",
            },
        ),
        Panel(
            "Calls alone", "ops", {f"sum by (reason) ({rate('engine_lone_calls_total')})": "{{reason}}"}, "By reason."
        ),
        Panel("Kinds of call tried joined", "none", {f"sum by (verdict) ({series('engine_kinds')})": "{{verdict}}"}),
    ],
    "Per model": [
        Panel("Images", "none", {f"sum by (model) ({rate('images_total')})": "{{model}}"}, "Per second."),
        Panel("Megapixels", "none", {f"sum by (model) ({rate('pixels_total')}) / 1e6": "{{model}}"}, "Per second."),
        Panel(
            "Latency p95",
            "s",
            {quantile(0.95, "e2e_request_latency_seconds", "model", "task"): "{{model}} {{task}}"},
        ),
        Panel("Time in the queue p95", "s", {quantile(0.95, "request_queue_time_seconds", "model"): "{{model}}"}),
        Panel("Steps", "ops", {f"sum by (model, use) ({rate('denoise_steps_total')})": "{{model}} {{use}}"}),
        Panel(
            "Generations",
            "reqps",
            {f"sum by (model, outcome) ({rate('generations_total')})": "{{model}} {{outcome}}"},
        ),
    ],
    "Reliability": [
        Panel(
            "Calls turned away",
            "reqps",
            {f"sum by (reason) ({rate('refusals_total')})": "{{reason}}"},
            "A full queue, a quota, no room, no token, a drain.",
        ),
        Panel("Restarts of workers", "none", {f"increase({series('worker_restarts_total')}[$__range])": "{{worker}}"}),
        Panel("Workers recycled", "none", {f"increase({series('worker_recycles_total')}[$__range])": "{{worker}}"}),
        Panel("Loads", "reqps", {f"sum by (outcome) ({rate('loads_total')}) > 0": "{{outcome}}"}),
        Panel("Load time p95", "s", {quantile(0.95, "load_seconds"): "p95"}),
        Panel(
            "Steps wasted",
            "percentunit",
            {f"sum({WASTED}) / sum({rate('denoise_steps_total')})": "wasted"},
            "Share of steps whose generation was cancelled or failed.",
            max=1,
        ),
        Panel(
            "Leases that ran out",
            "none",
            {f"increase({series('lease_expirations_total')}[$__range])": "{{instance}}"},
        ),
        Panel(
            "Generations run again",
            "reqps",
            {f"sum by (instance) ({rate('generation_replays_total')})": "{{instance}}"},
            "Because their worker died.",
        ),
        Panel(
            "Time until a change is on the disk",
            "s",
            {
                quantile(0.5, "journal_write_seconds"): "p50",
                quantile(0.99, "journal_write_seconds"): "p99",
            },
            "Loads, unloads and detached generations wait for it.",
        ),
        Panel(
            "Changes that wait for the disk",
            "none",
            {
                f"sum by (instance) ({series('journal_changes_waiting')})": "{{instance}}",
                f"sum by (instance) ({rate('journal_failures_total')})": "failed each second {{instance}}",
            },
        ),
    ],
}


def panels() -> Iterator[dict[str, Any]]:
    number, top = 0, 0
    for title, row in ROWS.items():
        number += 1
        position = {"h": 1, "w": COLUMNS, "x": 0, "y": top}
        yield {"id": number, "type": "row", "title": title, "collapsed": False, "gridPos": position, "panels": []}
        top += 1
        for place, panel in enumerate(row):
            number += 1
            line, column = divmod(place, COLUMNS // WIDTH)
            yield graph(panel, number, {"h": HEIGHT, "w": WIDTH, "x": column * WIDTH, "y": top + line * HEIGHT})
        top += -(-len(row) * WIDTH // COLUMNS) * HEIGHT


def graph(panel: Panel, number: int, position: dict[str, int]) -> dict[str, Any]:
    defaults: dict[str, Any] = {"unit": panel.unit}
    defaults |= {name: value for name, value in (("min", panel.min), ("max", panel.max)) if value is not None}
    if panel.kind == "timeseries":
        stacking = {"mode": "normal" if panel.stack else "none", "group": "A"}
        defaults["custom"] = {"fillOpacity": 40 if panel.stack else 10, "stacking": stacking, "showPoints": "never"}
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.text,
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "gridPos": position,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + index), "expr": expression, "legendFormat": legend, "exemplar": True}
            for index, (expression, legend) in enumerate(panel.queries.items())
        ],
    }


def variable(name: str) -> dict[str, Any]:
    return {
        "name": name,
        "type": "query",
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "query": f"label_values(denoised_build_info, {name})",
        "includeAll": True,
        "multi": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
        "refresh": 2,
    }


def dashboard() -> dict[str, Any]:
    return {
        "uid": "denoised",
        "title": "denoised",
        "tags": ["denoised"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [
                {"name": "datasource", "type": "datasource", "query": "prometheus", "current": {}},
                variable("job"),
                variable("instance"),
            ]
        },
        "panels": list(panels()),
    }


def main() -> None:
    text = json.dumps(dashboard(), indent=2) + "\n"
    if "--check" not in sys.argv:
        FILE.write_text(text)
    elif not FILE.exists() or FILE.read_text() != text:
        sys.exit("deploy/monitoring/dashboard.json is out of date, run `make generate`")


if __name__ == "__main__":
    main()
