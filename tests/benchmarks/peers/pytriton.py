"""PyTriton with the dynamic batching of Triton. `python -m … FOLDER PORT`."""

from __future__ import annotations

import base64
import sys
from typing import Any

import numpy as np
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

from tests.benchmarks.peers.pictures import BATCH_WAIT, MAX_BATCH, Pictures


def main(folder: str, port: str) -> None:
    pictures = Pictures(folder)

    @batch
    def draw(ask: Any) -> dict[str, Any]:
        # Its JSON takes text only.
        images = [base64.b64encode(image) for image in pictures.draw([row[0] for row in ask])]
        return {"image": np.array([[image] for image in images], dtype=object)}

    config = TritonConfig(http_port=int(port), http_address="127.0.0.1", allow_grpc=False, allow_metrics=False)
    with Triton(config=config) as triton:
        triton.bind(
            model_name="pictures",
            infer_func=draw,
            inputs=[Tensor(name="ask", dtype=bytes, shape=(1,))],
            outputs=[Tensor(name="image", dtype=bytes, shape=(1,))],
            config=ModelConfig(
                max_batch_size=MAX_BATCH,
                batcher=DynamicBatcher(max_queue_delay_microseconds=int(BATCH_WAIT * 1e6)),
            ),
        )
        triton.serve()


if __name__ == "__main__":
    main(*sys.argv[1:])
