"""Draws the pictures of the documentation: the dashboard and `denoised top`, of a real daemon at work.

A real Prometheus scrapes it; each panel's expressions are asked over the whole time, and one without data is an error.

python -m tests.monitoring.pictures           # writes docs/dashboard.svg, overview.svg and top.svg; takes three minutes
"""

from __future__ import annotations

import io
import json
import math
import os
import random
import re
import signal
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import denoised
from denoised.cli.top import View, picture
from PIL import Image
from rich import _export_format
from rich.console import Console

from tests import checkpoints, tools
from tests.daemon import Daemon
from tests.monitoring.drawing import Series, Span, draw, legend
from tests.monitoring.prometheus import MONITORING, Prometheus
from tests.tools import ROOT

DOCS = ROOT / "docs"
SETTINGS = 'max_running = 4\nmax_waiting = 4\nmemory_budget = "34MiB"\n'
STEP = 2.0
VARIABLES = {"$job": ".*", "$instance": ".*", "$__rate_interval": "12s", "$__range": "3m"}
# Seconds of each part, and how many clients there are in it.
COURSE = ((20, 1), (45, 4), (30, 14), (25, 6), (20, 2))
CRASH_AFTER = 100
TOP_WIDTH = 118


def keep_busy(daemon: Daemon, other: Path) -> str:
    """Clients that come and go, as in COURSE; returns what `denoised top` showed in the middle of it."""
    with daemon.client() as client, ThreadPoolExecutor(24) as threads:
        painter = client.load("demo", task="text-to-image", pipeline_id="painter")
        editor = client.derive(painter, "image-to-image", pipeline_id="editor")
        sketcher = client.load(other, task="text-to-image", pipeline_id="sketcher", dtype="float32")
        start = painter("red apple", num_inference_steps=4).images[0]
        crash = threads.submit(_crash, client, CRASH_AFTER)
        shown = threads.submit(_top, client, 75)
        for number, (seconds, count) in enumerate(COURSE):
            end = time.monotonic() + seconds
            chance = [random.Random(100 * number + index) for index in range(count)]
            jobs = [threads.submit(_work, painter, editor, sketcher, start, end, each) for each in chance]
            # Loads that fail, and one whose lease ends.
            with suppress(denoised.DenoisedError):
                client.load("demo", ttl=1)
                client.load("demo-that-is-not-there")
            for job in jobs:
                job.result()
        crash.result()
        return shown.result()


def _work(painter: Any, editor: Any, sketcher: Any, start: Image.Image, end: float, chance: random.Random) -> None:
    while time.monotonic() < end:
        steps, kind = chance.choice((8, 12, 20)), chance.random()
        with suppress(denoised.DenoisedError):
            if kind < 0.5:
                painter("rocket", num_inference_steps=steps, num_images_per_prompt=chance.choice((1, 1, 2)))
            elif kind < 0.75:
                editor("castle", image=start, num_inference_steps=steps)
            elif kind < 0.9:
                sketcher("a cat", num_inference_steps=steps, height=64, width=64)
            elif kind < 0.95:
                painter("rocket", num_inference_steps=900, timeout=1.0)
            else:
                painter("rocket", num_inference_steps=steps, batching="forbid")
            continue
        time.sleep(0.5)


def _crash(client: denoised.Client, seconds: float) -> None:
    time.sleep(seconds)
    os.kill(client.workers()[0].pid, signal.SIGKILL)


def _top(client: denoised.Client, seconds: float) -> str:
    time.sleep(seconds)
    before = View.of(client)
    time.sleep(1)
    console = Console(width=TOP_WIDTH, file=io.StringIO(), record=True, force_terminal=True)
    console.print(picture(View.of(client), before))
    # Without the addresses of fonts: a picture fetches nothing.
    plain = re.sub(r"@font-face \{\{.*?\}\}\n", "", _export_format.CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    return console.export_svg(title="denoised top", code_format=plain)


def read(prometheus: Prometheus, panel: dict[str, Any], span: Span) -> list[Series]:
    found = []
    for target in panel.get("targets", ()):
        expression = target["expr"]
        for name, value in VARIABLES.items():
            expression = expression.replace(name, value)
        for series in prometheus.query_range(expression, span.start, span.end, span.step):
            points = [(moment, float(value)) for moment, value in series["values"]]
            points = [point for point in points if math.isfinite(point[1])]
            found.append(Series(legend(target["legendFormat"], series["metric"]), points))
    if panel["type"] != "row" and not any(series.points for series in found):
        raise SystemExit(f"the panel {panel['title']!r} has no data")
    return found


def main() -> None:
    dashboard = json.loads((MONITORING / "dashboard.json").read_text())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "denoised.toml").write_text(SETTINGS)
        other = checkpoints.stable_diffusion(folder / "tiny-sd")
        with Daemon(folder / "state", "--config", str(folder / "denoised.toml"), allow=[folder]) as daemon:
            prometheus = Prometheus(folder, daemon.metrics_url.split("/")[2], interval="1s")
            try:
                tools.wait_until(lambda: bool(prometheus.query("denoised_build_info")))
                start = time.time()
                (DOCS / "top.svg").write_text(keep_busy(daemon, other))
                span = Span(start, time.time(), STEP)
                panels = [(panel, read(prometheus, panel, span)) for panel in dashboard["panels"]]
            finally:
                prometheus.stop()
    rows = [index for index, (panel, _) in enumerate(panels) if panel["type"] == "row"]
    (DOCS / "overview.svg").write_text(draw(panels[rows[0] + 1 : rows[1]], span))
    (DOCS / "dashboard.svg").write_text(draw(panels, span))


if __name__ == "__main__":
    main()
