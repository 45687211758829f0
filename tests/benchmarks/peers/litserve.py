"""LitServe with its batching. `python -m … FOLDER PORT`."""

from __future__ import annotations

import sys
from typing import Any

from litserve import LitAPI, LitServer
from starlette.responses import Response

from tests.benchmarks.peers.pictures import BATCH_WAIT, MAX_BATCH, Pictures


class PicturesAPI(LitAPI):
    def __init__(self, folder: str) -> None:
        super().__init__(max_batch_size=MAX_BATCH, batch_timeout=BATCH_WAIT)
        self._folder = folder

    def setup(self, device: Any) -> None:
        self._pictures = Pictures(self._folder)

    def predict(self, x: Any, **kwargs: Any) -> Any:
        return self._pictures.draw([request["ask"] for request in x])

    def encode_response(self, output: Any, **kwargs: Any) -> Any:
        return Response(output, media_type="image/png")


def main(folder: str, port: str) -> None:
    LitServer(PicturesAPI(folder), accelerator="cpu", workers_per_device=1, timeout=False).run(
        host="127.0.0.1", port=int(port), generate_client_file=False
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
