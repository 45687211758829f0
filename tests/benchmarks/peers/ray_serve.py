"""Ray Serve behind its gRPC proxy, with @serve.batch. `python -m … FOLDER PORT`."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from typing import Any

import grpc
from google.protobuf.wrappers_pb2 import BytesValue

from tests.benchmarks.peers.pictures import BATCH_WAIT, MAX_BATCH, Pictures

SERVICE, METHOD = "peers.Pictures", "draw"


def add_to_server(servicer: Any, server: Any) -> None:
    """What grpcio-tools would generate for one method from BytesValue to BytesValue."""
    handler = grpc.unary_unary_rpc_method_handler(
        getattr(servicer, METHOD),
        request_deserializer=BytesValue.FromString,
        response_serializer=BytesValue.SerializeToString,
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {METHOD: handler}),))


def main(folder: str, port: str) -> None:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray
    from ray import serve
    from ray.serve.config import gRPCOptions

    class Deployment:
        def __init__(self) -> None:
            self._pictures = Pictures(folder)

        @serve.batch(max_batch_size=MAX_BATCH, batch_wait_timeout_s=BATCH_WAIT)
        async def _batch(self, asks: list[bytes]) -> list[bytes]:
            return await asyncio.to_thread(self._pictures.draw, asks)

        async def draw(self, request: BytesValue) -> BytesValue:
            return BytesValue(value=await self._batch(request.value))

    deployment: Any = serve.deployment(max_ongoing_requests=64)(Deployment)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    options = gRPCOptions(port=int(port), grpc_servicer_functions=[f"{__spec__.name}.add_to_server"])
    serve.start(grpc_options=options, http_options={"port": int(port) + 1})
    serve.run(deployment.bind(), name="pictures", route_prefix="/")
    while True:
        time.sleep(60)


if __name__ == "__main__":
    main(*sys.argv[1:])
