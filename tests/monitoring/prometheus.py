"""A real Prometheus, with the rules of deploy/monitoring."""

from __future__ import annotations

import json
import urllib.error
import urllib.parse
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from tests import tools
from tests.tools import ROOT

MONITORING = ROOT / "deploy" / "monitoring"


class Prometheus:
    """Scrapes one daemon, by default every half a second. `page` is one that it could have read."""

    page: bytes = b""

    def __init__(self, folder: Path, target: str, *, interval: str = "500ms") -> None:
        config = {
            "global": {"scrape_interval": interval, "evaluation_interval": "1s"},
            "rule_files": [str(MONITORING / "rules.yaml")],
            "scrape_configs": [{"job_name": "denoised", "static_configs": [{"targets": [target]}]}],
        }
        (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
        self.url = f"http://127.0.0.1:{tools.free_port()}"
        self._process = tools.start(
            [
                "prometheus",
                f"--config.file={folder / 'prometheus.yaml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address={self.url.removeprefix('http://')}",
                "--enable-feature=exemplar-storage",
            ],
            folder / "prometheus.log",
        )

        def is_ready() -> bool:
            with suppress(urllib.error.URLError):
                return bool(urllib.request.urlopen(f"{self.url}/-/ready", timeout=5).status == 200)
            return False

        tools.wait_until(is_ready)

    def get(self, path: str, **parameters: str) -> Any:
        address = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(address, timeout=10) as response:
                return json.load(response)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{parameters}: {error.read().decode()}") from None

    def query(self, expression: str) -> list[Any]:
        return list(self.get("query", query=expression)["result"])

    def query_range(self, expression: str, start: float, end: float, step: float) -> list[Any]:
        found = self.get("query_range", query=expression, start=str(start), end=str(end), step=str(step))
        return list(found["result"])

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(30)
