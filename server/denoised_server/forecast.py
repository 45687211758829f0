"""Forecasts: how long generations take, learned from those that have finished, and which can meet no deadline."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from denoised.errors import DeadlineTooShortError, DeadlineUnmeetableError
from denoised.values import Artifact, Plain

from .messages import Finished, Generate, Loaded, Spec

# What one kind is judged by. Old runs say little: others ran beside them.
RECENT = 16
# How long a run counts against later ones: were it for ever, a kind that was slow once would never be let in again.
EVIDENCE_SECONDS = 120.0
MAX_KINDS = 512
MIN_RETRY_SECONDS = 1.0
# Arguments that say how much work a step is; pictures and prompts count by their number.
SIZES = ("height", "width", "num_frames", "num_images_per_prompt")


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds that a generation takes from its admission on: as a rule, and at least. None where nothing is known.

    `tail` is what of it comes after the last step, as a rule.
    """

    usual: float | None = None
    least: float | None = None
    tail: float = 0.0


UNKNOWN = Cost()


class Demand(NamedTuple):
    """What a generation asks for: a kind, of which each step costs the same, and a number of steps.

    One that takes its size from a picture is not `is_sized`: others of its kind do not show what it takes at least.
    Others of its `pipeline` show about what it takes, where none of its kind has run.
    """

    kind: Hashable
    steps: float
    is_sized: bool = True
    pipeline: Hashable = None


class _Run(NamedTuple):
    when: float
    step: float
    before: float
    after: float

    def seconds(self, steps: float) -> float:
        return self.before + steps * self.step + self.after


class Forecast:
    """What generations of each kind have cost lately."""

    def __init__(self) -> None:
        self._runs: OrderedDict[Hashable, deque[_Run]] = OrderedDict()
        self._of_pipelines: OrderedDict[Hashable, deque[_Run]] = OrderedDict()

    def learn(self, demand: Demand, finished: Finished, now: float) -> None:
        """Takes into account one that has ended well."""
        denoising = [phase for phase in finished.phases if phase.name == "denoise"]
        total = finished.run_seconds + finished.encode_seconds
        step = before = after = 0.0
        if denoising and demand.steps:
            step = min(total, denoising[-1].end_time - denoising[0].start_time) / demand.steps
            before = max(0.0, denoising[0].start_time - finished.phases[0].start_time)
            after = max(0.0, total - before - step * demand.steps)
        else:
            before = total
        run = _Run(now, step, before, after)
        for known, key in ((self._runs, demand.kind), (self._of_pipelines, demand.pipeline)):
            known.setdefault(key, deque(maxlen=RECENT)).append(run)
            known.move_to_end(key)
            if len(known) > MAX_KINDS:
                known.popitem(last=False)

    def cost(self, demand: Demand, now: float) -> Cost:
        runs = self._runs.get(demand.kind)
        if not runs:
            like = self._of_pipelines.get(demand.pipeline) if demand.pipeline is not None else None
            return Cost(usual=sum(run.seconds(demand.steps) for run in like) / len(like)) if like else UNKNOWN
        seconds = [(run.when, run.seconds(demand.steps)) for run in runs]
        fresh = [each for when, each in seconds if now - when <= EVIDENCE_SECONDS]
        return Cost(
            usual=sum(each for _, each in seconds) / len(seconds),
            least=min(fresh, default=None) if demand.is_sized else None,
            tail=sum(run.after for run in runs) / len(runs),
        )


def demand(command: Generate, spec: Spec, loaded: Loaded) -> Demand:
    """What a command asks of a pipeline."""
    arguments: Mapping[str, Plain] = command.arguments
    known = {parameter.name: parameter.default for parameter in loaded.parameters} | dict(arguments)
    prompt = arguments.get("prompt")
    pipeline = spec.repo_id, spec.single_file, spec.dtype, loaded.pipeline_class, command.method
    kind = (
        (*pipeline, command.output_type),
        command.priority,
        tuple(_length(arguments.get(name)) for name in ("timesteps", "sigmas")),
        tuple(_number(known.get(name), -1.0) for name in ("denoising_start", "denoising_end", "true_cfg_scale")),
        tuple(known.get(name) if isinstance(known.get(name), int) else None for name in SIZES),
        len(prompt) if isinstance(prompt, list | tuple) else 1,
        # Guidance doubles a step, and pictures come in all sizes, which nobody looks into here.
        _number(known.get("guidance_scale"), 0.0) > 1,
        command.forbid_batching,
    )
    steps, strength = _number(known.get("num_inference_steps"), 1.0), _number(known.get("strength"), 1.0)
    is_sized = isinstance(known.get("height"), int) or not any(map(_is_picture, arguments.values()))
    return Demand(kind, max(1.0, steps * min(1.0, max(0.0, strength))), is_sized, pipeline)


def _length(value: Plain) -> int | None:
    return len(value) if isinstance(value, list | tuple) else None


def _is_picture(value: Plain) -> bool:
    if isinstance(value, list | tuple):
        return any(map(_is_picture, value))
    return isinstance(value, Artifact) and value.media_type.startswith("image/")


def check_deadline(left: float, cost: Cost, wait: float) -> None:
    """Raises for a generation that cannot end in the seconds that are left.

    One that would be in time if nobody were ahead of it is told when to try again. What is not known counts for
    nothing: nobody is turned away on a guess.
    """
    least = cost.least or 0.0
    if least > left:
        raise DeadlineTooShortError(
            f"{left:.3g} s are left, and the fastest of the last runs of this kind took {least:.3g} s.",
            hint="Allow more time, or ask for fewer steps or a smaller picture.",
            metadata={"least_seconds": f"{least:.3f}"},
        )
    if wait + least > left:
        raise DeadlineUnmeetableError(
            f"{left:.3g} s are left, and those ahead of it take {wait:.3g} s.",
            hint="Allow more time, or try again when fewer are waiting.",
            retry_after=max(MIN_RETRY_SECONDS, wait + least - left),
            metadata={"wait_seconds": f"{wait:.3f}", "least_seconds": f"{least:.3f}"},
        )


def _number(value: Plain, otherwise: float) -> float:
    return float(value) if isinstance(value, int | float) else otherwise
