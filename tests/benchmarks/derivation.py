"""How long DerivePipeline takes, seen by a client."""

from __future__ import annotations

from tests.benchmarks import setting

ROUNDS = 100


def main() -> None:
    with setting.daemon() as daemon, daemon.client() as client:
        source = client.load("demo", task="text-to-image")
        before = client.workers()[0].memory.weight_bytes
        times = [setting.seconds(lambda: client.derive(source, "inpainting")) for _ in range(ROUNDS)]
        after = client.workers()[0].memory.weight_bytes
    print(f"derive       {setting.spread(times)}, slowest {max(times) * 1e3:.1f} ms, {after - before} new bytes")


if __name__ == "__main__":
    main()
