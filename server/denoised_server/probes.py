"""Health: one honest answer to how the daemon is, and what each probe makes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from .supervision import WorkerState

PATHS = ("/healthz", "/readyz", "/startupz")


class Health(StrEnum):
    """How the daemon is."""

    STARTING = "starting"
    READY = "ready"
    DEGRADED = "degraded"
    DRAINING = "draining"
    FAILING = "failing"


@dataclass(frozen=True, slots=True)
class Standing:
    """How a pipeline stands that the daemon is to have; `failure` is the reason of an error that will not pass."""

    is_usable: bool
    failure: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """How the daemon is, and why, in sentences for people."""

    health: Health
    reasons: tuple[str, ...] = ()

    @property
    def is_serving(self) -> bool:
        """Whether new work has a chance."""
        return self.health in (Health.READY, Health.DEGRADED)


def judge(
    *,
    is_started: bool,
    is_draining: bool,
    workers: Mapping[str, WorkerState],
    preloads: Mapping[str, Standing],
) -> Report:
    """The health of a daemon with these workers, and these pipelines that it is to have.

    One without any usable pipeline of those is starting again while they are brought back, and failing when they cannot
    be.
    """
    if is_draining:
        return Report(Health.DRAINING, ("No new work is taken.",))
    active = [name for name, state in workers.items() if state is WorkerState.ACTIVE]
    lost = [f"{name} is {state}." for name, state in workers.items() if state is not WorkerState.ACTIVE]
    missing = {name: standing for name, standing in preloads.items() if not standing.is_usable}
    reasons = (*lost, *(_reason(name, standing) for name, standing in missing.items()))
    if not is_started:
        return Report(Health.STARTING, reasons)
    if not active:
        is_drained = all(state is WorkerState.DRAINING for state in workers.values())
        return Report(Health.DRAINING if is_drained else Health.FAILING, reasons)
    if missing and len(missing) == len(preloads):
        is_lasting = all(standing.failure for standing in missing.values())
        return Report(Health.FAILING if is_lasting else Health.STARTING, reasons)
    return Report(Health.DEGRADED if reasons else Health.READY, reasons)


def _reason(name: str, standing: Standing) -> str:
    return f"{name} does not work: {standing.failure}." if standing.failure else f"{name} is not ready."


def answer(path: str, report: Report, *, has_started: bool) -> tuple[int, str] | None:
    """The HTTP status and the text for a probe's path; None for other paths.

    /healthz fails where starting again is the only hope, /readyz where no new work should come, /startupz until the
    daemon has been ready once.
    """
    match path:
        case "/healthz":
            is_well = report.health is not Health.FAILING
        case "/readyz":
            is_well = report.is_serving
        case "/startupz":
            is_well = has_started
        case _:
            return None
    return 200 if is_well else 503, "\n".join((report.health, *report.reasons)) + "\n"
