"""BentoML with its adaptive batching. `python -m … FOLDER PORT`."""

from __future__ import annotations

import base64
import os
import sys

import bentoml

from tests.benchmarks.peers.pictures import MAX_BATCH, Pictures

FOLDER = "PICTURES_FOLDER"


@bentoml.service(workers=1, traffic={"timeout": 600, "max_concurrency": 64})
class Service:
    def __init__(self) -> None:
        self._pictures = Pictures(os.environ[FOLDER])

    @bentoml.api(batchable=True, max_batch_size=MAX_BATCH, max_latency_ms=600_000)
    def draw(self, asks: list[str]) -> list[str]:
        return [base64.b64encode(image).decode() for image in self._pictures.draw(asks)]


def main(folder: str, port: str) -> None:
    os.environ[FOLDER] = folder
    command = [sys.executable, "-m", "bentoml", "serve", "tests.benchmarks.peers.bentoml:Service"]
    os.execv(sys.executable, [*command, "--host", "127.0.0.1", "--port", port])


if __name__ == "__main__":
    main(*sys.argv[1:])
