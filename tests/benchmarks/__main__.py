"""Runs the benchmarks one after another; `python -m tests.benchmarks NAME …` runs those."""

import importlib
import sys

NAMES = (
    "overhead",
    "concurrency",
    "coalescing",
    "derivation",
    "demo_quality",
    "serving",
    "stress",
    "residency",
    "loading",
    "encoding",
    "previews",
    "idle",
)


def main() -> None:
    for name in sys.argv[1:] or NAMES:
        if name not in NAMES:
            sys.exit(f"there is no benchmark {name!r}, only {', '.join(NAMES)}")
        print(f"\n--- {name}", flush=True)
        importlib.import_module(f"tests.benchmarks.{name}").main()


if __name__ == "__main__":
    main()
