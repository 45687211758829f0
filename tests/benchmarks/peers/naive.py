"""A gRPC server as a first attempt writes it: one pipeline object, one lock. `python -m … FOLDER PORT`."""

from __future__ import annotations

import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

from tests.benchmarks.peers.pictures import Pictures


def main(folder: str, port: str) -> None:
    pictures, lock = Pictures(folder), threading.Lock()

    def draw(request: bytes, context: grpc.ServicerContext) -> bytes:
        with lock:
            return pictures.draw([request])[0]

    server = grpc.server(ThreadPoolExecutor(32))
    handler: Any = grpc.unary_unary_rpc_method_handler(draw)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("peers.Pictures", {"Draw": handler}),))
    server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    server.wait_for_termination()


if __name__ == "__main__":
    main(*sys.argv[1:])
