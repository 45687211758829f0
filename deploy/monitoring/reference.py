"""Writes docs/metrics.md, the reference of the metrics, from `denoised_server.metric_set`; `make generate` runs it.

`--check` only says whether what is checked in is what would be written.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

from denoised_server import metric_set, metrics
from denoised_server.metric_set import Definition, Kind

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"
HEAD = f"""# Metrics

Written by `deploy/monitoring/reference.py` from `server/denoised_server/metric_set.py`: edit that.

Prometheus reads them at `--metrics-address`, by default `http://127.0.0.1:9464/metrics`. Whoever asks for OpenMetrics
gets it, with the ids of traces as exemplars where the daemon is traced. A dashboard, alerts and recording rules are in
[deploy/monitoring](../deploy/monitoring), what to do about an alert in [the runbook](runbook.md).

- Units are seconds and bytes. Counters go on over a worker's restart; gauges of a dead worker are not there.
- Labels are bounded: handles, prompts, request ids and adapters are never one. `model` is a repository's name, or the
  last part of a directory's; the first {metrics.MAX_MODELS} models that were loaded have their own, others are `other`.
- Series whose labels are known beforehand start at zero, so that rates are right from the first event on.
- Names that vLLM's users know mean what they mean there: `num_requests_running`, `num_requests_waiting`,
  `request_queue_time_seconds`, `e2e_request_latency_seconds`.
"""


def document() -> Iterator[str]:
    yield HEAD
    yield "| metric | kind | labels | what it says |\n|---|---|---|---|"
    for definition in metric_set.DEFINITIONS:
        labels = ", ".join(f"`{label}`" for label in definition.labels)
        yield f"| `{definition.name}` | {definition.kind} | {labels} | {definition.text} |"
    yield "\n## Labels\n"
    yield "| label | of | what it holds |\n|---|---|---|"
    for (label, text), names in by_label(metric_set.DEFINITIONS).items():
        of = "all that have it" if len(names) > 2 else ", ".join(f"`{name}`" for name in names)
        yield f"| `{label}` | {of} | {text} |"
    yield "\n## Buckets\n"
    for definition in metric_set.DEFINITIONS:
        if definition.kind is Kind.HISTOGRAM:
            yield f"- `{definition.name}`: {', '.join(f'{bound:g}' for bound in definition.buckets)}"


def by_label(definitions: tuple[Definition, ...]) -> dict[tuple[str, str], list[str]]:
    found: dict[tuple[str, str], list[str]] = {}
    for definition in definitions:
        for label, text in definition.labels.items():
            found.setdefault((label, text), []).append(definition.name)
    return found


def main() -> None:
    page = "\n".join(document()).rstrip() + "\n"
    if "--check" not in sys.argv:
        PAGE.write_text(page)
    elif not PAGE.exists() or PAGE.read_text() != page:
        sys.exit("docs/metrics.md is out of date, run `make generate`")


if __name__ == "__main__":
    main()
