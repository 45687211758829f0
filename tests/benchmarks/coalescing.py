"""What is joined of every family that the parity suite builds, and why not the rest: three requests at once, twice.

The table at the end is that of docs/coalescing.md.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from denoised.v1 import worker_service_pb2 as pb

from tests.benchmarks import setting
from tests.parity.checkpoints import FAMILIES
from tests.parity.pair import Pairs

TOGETHER, ROUNDS = 3, 2
REPORT_SECONDS = 2.5


def main() -> None:
    print(f"{'family':28} {'method':42} {'calls':>6} {'joined':>7}  alone because")
    rows: list[str] = []
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
            shares = {
                name: _report(str(family), before.get(name, pb.MethodStats()), stats)
                for name, stats in sorted(after.items())
                if stats.call_count > before.get(name, pb.MethodStats()).call_count
            }
            rows.append(_row(str(family), shares))
            before = after
    print("\n| family | joined | never joined in this run |\n|---|---|---|", *rows, sep="\n")


def _row(family: str, shares: Mapping[str, tuple[float, str]]) -> str:
    """A line of the table, of each method's share of joined calls and the first reason of the others."""
    joined = ", ".join(f"{name} {share:.0%}" for name, (share, _) in shares.items() if share)
    never = ", ".join(f"{name} ({reason})" for name, (share, reason) in shares.items() if not share)
    return f"| {family} | {joined or '–'} | {never or '–'} |"


def _report(family: str, before: pb.MethodStats, after: pb.MethodStats) -> tuple[float, str]:
    """Prints a line on a method, and returns the share of its calls that were joined and why most others were not."""
    calls = after.call_count - before.call_count
    joined = after.joined_call_count - before.joined_call_count
    reasons = {
        reason: count - before.lone_call_counts.get(reason, 0)
        for reason, count in sorted(after.lone_call_counts.items())
    }
    said = ", ".join(f"{reason} {count}" for reason, count in reasons.items() if count)
    if after.refused_kind_count > before.refused_kind_count:
        said += f" (beyond {after.refused_difference:.2g} of the tolerance)"
    print(f"{family:28} {after.method:42} {calls:6} {joined / calls:7.0%}  {said}", flush=True)
    return joined / calls, max(reasons, key=reasons.__getitem__, default="")


if __name__ == "__main__":
    main()
