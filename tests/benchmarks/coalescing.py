"""What is joined of every family that the parity suite builds, and why not the rest: three requests at once, twice."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from denoised.v1 import worker_service_pb2 as pb

from tests.benchmarks import setting
from tests.parity.checkpoints import FAMILIES
from tests.parity.pair import Pairs

TOGETHER, ROUNDS = 3, 2
REPORT_SECONDS = 2.5


def main() -> None:
    print(f"{'family':28} {'method':42} {'calls':>6} {'joined':>7}  alone because")
    with (
        tempfile.TemporaryDirectory() as folder,
        setting.daemon(allow=[Path(folder)]) as daemon,
        daemon.client() as client,
        Pairs(client, Path(folder)) as pairs,
    ):
        before: dict[str, pb.MethodStats] = {}
        for family in (family for family in FAMILIES if not family.is_missing_a_package):
            pair = pairs.of(family)
            for task in family.mapped():
                for _ in range(ROUNDS):
                    pair.together(task, TOGETHER)
            # Until the worker has reported.
            time.sleep(REPORT_SECONDS)
            after = {stats.method: stats for stats in client.workers()[0].engine.methods}
            for name, stats in after.items():
                _report(str(family), before.get(name, pb.MethodStats()), stats)
            before = after


def _report(family: str, before: pb.MethodStats, after: pb.MethodStats) -> None:
    if not (calls := after.call_count - before.call_count):
        return
    joined = after.joined_call_count - before.joined_call_count
    reasons = {
        reason: count - before.lone_call_counts.get(reason, 0)
        for reason, count in sorted(after.lone_call_counts.items())
    }
    said = ", ".join(f"{reason} {count}" for reason, count in reasons.items() if count)
    if after.refused_kind_count > before.refused_kind_count:
        said += f" (beyond {after.refused_difference:.2g} of the tolerance)"
    print(f"{family:28} {after.method:42} {calls:6} {joined / calls:7.0%}  {said}", flush=True)


if __name__ == "__main__":
    main()
