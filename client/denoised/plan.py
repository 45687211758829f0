"""What loading a pipeline would take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .spec import dtype_name
from .units import from_duration
from .v1 import pipeline_service_pb2 as pb

OUTCOMES = {
    pb.PlanPipelineResponse.OUTCOME_FITS: "fits",
    pb.PlanPipelineResponse.OUTCOME_EVICTS: "evicts",
    pb.PlanPipelineResponse.OUTCOME_TAKES_TURNS: "takes turns",
    pb.PlanPipelineResponse.OUTCOME_NO_ROOM: "no room",
    pb.PlanPipelineResponse.OUTCOME_NEVER_FITS: "never fits",
}


@dataclass(frozen=True, slots=True)
class PlannedComponent:
    """A component with weights that the pipeline would have.

    Attributes:
        role: Its role, such as "unet".
        class_name: Its class, such as "UNet2DConditionModel".
        digest: Identity of its content.
        weight_bytes: Size of its weights in memory.
        dtype: Element type that it would be held in, such as "float16".
        file_bytes: Bytes in its files by element type, under its safetensors name, such as "F16".
        held: Whether its content is held already, so that it would be shared.
    """

    role: str
    class_name: str
    digest: str
    weight_bytes: int
    dtype: str
    file_bytes: Mapping[str, int]
    held: bool


@dataclass(frozen=True, slots=True)
class PlannedEviction:
    """A component that would leave the device.

    Attributes:
        digest: Identity of its content.
        class_name: Its class.
        freed_bytes: Bytes that its leaving frees.
        pipelines: Those that use it, as far as the caller sees them; they stay valid.
    """

    digest: str
    class_name: str
    freed_bytes: int
    pipelines: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """What loading a pipeline would take at this moment; nothing of it is promised. Sizes in bytes.

    Attributes:
        outcome: "fits", "evicts" (once idle components have left the device), "takes turns" (it loads, and its
            components come to the device when they are called), "no room" or "never fits".
        worker: The worker that would hold it.
        components: Its components with weights.
        new_bytes: Weights that are not held yet.
        shared_bytes: Weights that are held already and would be shared.
        free_bytes: What weights may still take.
        evictable_bytes: Weights that are idle and may leave the device.
        budget_bytes: What weights may take in all.
        evictions: What would leave the device.
        download_bytes: What would be downloaded first.
        load_seconds: How long reading the new weights is expected to take, after the download.
    """

    outcome: str
    worker: str
    components: tuple[PlannedComponent, ...]
    new_bytes: int
    shared_bytes: int
    free_bytes: int
    evictable_bytes: int
    budget_bytes: int
    evictions: tuple[PlannedEviction, ...]
    download_bytes: int
    load_seconds: float

    @property
    def fits(self) -> bool:
        """Whether loading it would succeed as things are."""
        return self.outcome in ("fits", "evicts", "takes turns")

    @classmethod
    def of(cls, message: pb.PlanPipelineResponse) -> Plan:
        return cls(
            outcome=OUTCOMES.get(message.outcome, ""),
            worker=message.worker,
            components=tuple(
                PlannedComponent(
                    role=part.role,
                    class_name=part.class_name,
                    digest=part.digest,
                    weight_bytes=part.weight_bytes,
                    dtype=dtype_name(part.dtype),
                    file_bytes=dict(part.file_bytes),
                    held=part.held,
                )
                for part in message.components
            ),
            new_bytes=message.new_bytes,
            shared_bytes=message.shared_bytes,
            free_bytes=message.free_bytes,
            evictable_bytes=message.evictable_bytes,
            budget_bytes=message.budget_bytes,
            evictions=tuple(
                PlannedEviction(each.digest, each.class_name, each.freed_bytes, tuple(each.pipelines))
                for each in message.evictions
            ),
            download_bytes=message.download_bytes,
            load_seconds=from_duration(message.expected_load_duration),
        )
