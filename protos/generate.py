"""Generates client/denoised/v1 from the .proto files; `make generate` runs it with an old, pinned grpcio-tools.

The proto package, the folder under protos/ and the Python package are all `denoised.v1`, so the imports that protoc
writes are right as they are. The old generator keeps the SDK's floors for grpcio and protobuf low.

`--check` only says whether what is checked in is what would be generated.
"""

import filecmp
import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc

PROTOS = Path(__file__).parent
CLIENT = PROTOS.parent / "client"
KINDS = ("python", "grpc_python", "mypy", "mypy_grpc")


def generate(out: Path) -> None:
    sources = sorted(str(path) for path in PROTOS.rglob("*.proto"))
    flags = [f"--{kind}_out={'quiet:' if 'mypy' in kind else ''}{out}" for kind in KINDS]
    include = str(Path(protoc.__file__).parent / "_proto")
    if protoc.main(["protoc", f"-I{PROTOS}", f"-I{include}", *flags, *sources]):
        sys.exit("protoc failed")


def main() -> None:
    if "--check" not in sys.argv:
        generate(CLIENT)
        return
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        fresh = {path.relative_to(folder) for path in Path(folder).rglob("*_pb2*")}
        present = {path.relative_to(CLIENT) for path in (CLIENT / "denoised" / "v1").rglob("*_pb2*.py*")}
        present = {path for path in present if "__pycache__" not in path.parts}
        _, differing, missing = filecmp.cmpfiles(folder, CLIENT, [str(path) for path in fresh], shallow=False)
        stale = sorted({*differing, *missing, *map(str, present - fresh)})
    if stale:
        sys.exit("out of date, run `make generate`: " + ", ".join(stale))


if __name__ == "__main__":
    main()
