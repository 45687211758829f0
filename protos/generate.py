"""Generates client/denoised/v1 from the .proto files; `make generate` runs it with an old, pinned grpcio-tools.

The proto package, the folder under protos/ and the Python package are all `denoised.v1`, so the imports that protoc
writes are right as they are. The old generator keeps the SDK's floors for grpcio and protobuf low.
"""

import sys
from pathlib import Path

from grpc_tools import protoc

PROTOS = Path(__file__).parent
OUT = PROTOS.parent / "client"


def main() -> int:
    sources = sorted(str(path) for path in PROTOS.rglob("*.proto"))
    flags = [f"--{kind}_out={OUT}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
    include = str(Path(protoc.__file__).parent / "_proto")
    return int(protoc.main(["protoc", f"-I{PROTOS}", f"-I{include}", *flags, *sources]))


if __name__ == "__main__":
    sys.exit(main())
