"""Every metric there is: its name, its kind, what it says, and what its labels may hold.

Labels are bounded. A model's alias is the repository's name, or the last part of a directory's, of pipelines that were
really loaded; after so many of them it is `other`. Handles, prompts, request ids and adapters are never labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

PREFIX = "denoised_"


class Kind(StrEnum):
    """How Prometheus treats it."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Definition:
    """One metric. `labels` says of each label what it holds; `unit` is the end of the name where there is one."""

    name: str
    kind: Kind
    text: str
    labels: Mapping[str, str] = field(default_factory=dict)
    unit: str = ""
    buckets: tuple[float, ...] = ()


# Calls take from milliseconds to many minutes.
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1200)
BATCH_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
# From a fast disk to one that hardly answers.
JOURNAL_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
AGES = (1, 5, 15, 60, 300, 900, 3600, 14_400, 86_400)
ARRIVAL_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
RATIOS = (0.25, 0.5, 0.75, 0.9, 0.98, 1.02, 1.1, 1.25, 1.5, 2, 4)
STEP_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)

# Labels that are known beforehand.
CALL_PHASES = ("text_encode", "image_encode", "denoise", "decode", "safety_check")
PHASES = ("load", "queue", *CALL_PHASES, "encode")
LONE_REASONS = ("unmatched", "verifying", "forbidden", "changed", "unbatched", "refused")

METHOD = {"method": "the method of the API"}
OUTCOME = {"outcome": "`ok`, `cancelled`, or the error's reason in lower case"}
MODEL = {"model": "the model's alias, or `other`"}
TASK = {"task": "what the pipeline is for, such as `text-to-image`"}
WORKER = {"worker": "the worker's name, such as `workers/0`"}

_ALL: list[Definition] = []


def _define(
    name: str,
    kind: Kind,
    text: str,
    labels: Mapping[str, str] | None = None,
    *,
    unit: str = "",
    buckets: tuple[float, ...] = (),
) -> Definition:
    definition = Definition(PREFIX + name, kind, text, labels or {}, unit, buckets)
    _ALL.append(definition)
    return definition


# Calls

REQUESTS = _define("requests_total", Kind.COUNTER, "Calls that ended, by outcome.", METHOD | OUTCOME)
REQUEST_SECONDS = _define(
    "request_seconds", Kind.HISTOGRAM, "Time from a call's start to its end.", METHOD, unit="seconds", buckets=SECONDS
)
REFUSALS = _define(
    "refusals_total",
    Kind.COUNTER,
    "Calls that were turned away before anything was done for them.",
    {"reason": "the error's reason in lower case: a full queue, a quota, no room, no token, a drain, …"},
)

# Generations

RUNNING = _define("num_requests_running", Kind.GAUGE, "Generations that a worker runs.", WORKER)
WAITING = _define("num_requests_waiting", Kind.GAUGE, "Generations that wait for a worker.", WORKER)
GENERATIONS = _define("generations_total", Kind.COUNTER, "Generations that ended.", MODEL | TASK | OUTCOME)
LATENCY = _define(
    "e2e_request_latency_seconds",
    Kind.HISTOGRAM,
    "Time from a generation's arrival to its last output, of those that ended well.",
    MODEL | TASK,
    unit="seconds",
    buckets=SECONDS,
)
QUEUE_TIME = _define(
    "request_queue_time_seconds",
    Kind.HISTOGRAM,
    "Time that generations waited to be admitted, the loading of their pipeline included.",
    MODEL,
    unit="seconds",
    buckets=SECONDS,
)
PHASE_SECONDS = _define(
    "request_phase_seconds",
    Kind.HISTOGRAM,
    "Time that generations which ended well spent in each phase, waiting for others' calls included.",
    {
        "phase": "`load`, `queue`, then `text_encode`, `image_encode`, `denoise`, `decode` and `safety_check` by what "
        "the component calls were for, and `encode` for the media"
    },
    unit="seconds",
    buckets=SECONDS,
)
STEPS = _define(
    "denoise_steps_total",
    Kind.COUNTER,
    "Denoising steps that were run.",
    MODEL | {"use": "`useful` where the generation ended well, else `wasted`"},
)
REPLAYS = _define(
    "generation_replays_total", Kind.COUNTER, "Times a generation was run again because its worker had died."
)
IMAGES = _define("images_total", Kind.COUNTER, "Images that were sent to callers.", MODEL)
PIXELS = _define("pixels_total", Kind.COUNTER, "Pixels of the images that were sent to callers.", MODEL)

# Pipelines

PIPELINES = _define("pipelines", Kind.GAUGE, "Pipelines held.", {"state": "`loading`, `active` or `unloading`"})
LOADS = _define("loads_total", Kind.COUNTER, "Pipelines built, for the first time or again.", OUTCOME)
LOAD_SECONDS = _define(
    "load_seconds", Kind.HISTOGRAM, "Time that building a pipeline took.", unit="seconds", buckets=SECONDS
)
LOAD_PHASE_SECONDS = _define(
    "load_phase_seconds_total",
    Kind.COUNTER,
    "Time that builds of pipelines spent in each phase.",
    {"phase": "as in LoadProgress: `looking_up`, `downloading`, `reading_weights`, `moving_to_device`, or `other`"},
    unit="seconds",
)
EXPIRATIONS = _define("lease_expirations_total", Kind.COUNTER, "Pipelines that were unloaded because nobody used them.")

# Workers

WORKER_UP = _define("worker_up", Kind.GAUGE, "Whether a worker is there and reports: 1, else 0.", WORKER)
RESTARTS = _define("worker_restarts_total", Kind.COUNTER, "Times a worker was started again.", WORKER)
RECYCLES = _define(
    "worker_recycles_total",
    Kind.COUNTER,
    "Times a worker was started again because it held more in no book than `leak_limit`; these are restarts, too.",
    WORKER,
)
MEMORY = _define(
    "device_memory_bytes",
    Kind.GAUGE,
    "Memory of a device. Not there while its worker is not.",
    WORKER
    | {
        "kind": "`total`, `budget` (what weights may take), `weight`, `reserved` (promised to loads), `process` (what "
        "the worker's process takes), `working_set` (what calls work in), `working_set_budget` (what they have for "
        "sure), `headroom` (promised to nobody), `cached` (freed, and kept by the allocator), `free` (on the device), "
        "`evictable` (idle weights), `unaccounted` (in use while the worker was idle, and in no book), `unreclaimed` "
        "(weights that were let go of and are still there)"
    },
    unit="bytes",
)
COMPONENTS = _define(
    "component_bytes",
    Kind.GAUGE,
    "Weights held, each component counted once. Not there while its worker is not.",
    WORKER | {"residency": "`device`, `host` or `disk`"},
    unit="bytes",
)
SAVED = _define(
    "shared_saved_bytes",
    Kind.GAUGE,
    "Weights that would be held if nothing were shared, less those held. Not there while its worker is not.",
    WORKER,
    unit="bytes",
)

EVICTIONS = _define(
    "evictions_total",
    Kind.COUNTER,
    "Components that had to leave a tier.",
    WORKER
    | {
        "reason": "`room` (others needed it), `idle` (its `keep_alive` was over) or `out_of_memory`",
        "tier": "the one that was left: `device` or `host`",
    },
)
EVICTION_AGE = _define(
    "eviction_age_seconds",
    Kind.HISTOGRAM,
    "Time since a component's last use when it was evicted.",
    WORKER,
    unit="seconds",
    buckets=AGES,
)
ARRIVAL_TIME = _define(
    "arrival_seconds",
    Kind.HISTOGRAM,
    "What bringing a component back to the device took.",
    WORKER | {"tier": "where it was: `host` or `disk`"},
    unit="seconds",
    buckets=ARRIVAL_SECONDS,
)
ARRIVED = _define(
    "arrived_bytes_total",
    Kind.COUNTER,
    "Weights that were brought back to the device.",
    WORKER | {"tier": "where they were: `host` or `disk`"},
    unit="bytes",
)
RECOVERIES = _define(
    "out_of_memory_total",
    Kind.COUNTER,
    "Component calls that ran out of memory.",
    WORKER
    | {
        "rung": "what helped: `free_caches`, `evict_idle`, `slice`, `tile`, `split`, `run_alone` or `offload`; `none` "
        "where nothing did and the generation failed"
    },
)
ESTIMATE_RATIO = _define(
    "estimate_ratio",
    Kind.HISTOGRAM,
    "What memory was taken, over what had been estimated.",
    WORKER | {"estimate": "`weights` of a load, or the `working_set` of a call"},
    buckets=RATIOS,
)

# Engines

CALLS = _define("engine_calls_total", Kind.COUNTER, "Component calls that generations made.", WORKER)
BATCHES = _define("engine_batches_total", Kind.COUNTER, "Batches that component calls ran as.", WORKER)
JOINED = _define("engine_joined_calls_total", Kind.COUNTER, "Component calls that shared a batch.", WORKER)
FUSED = _define(
    "engine_fused_requests_total",
    Kind.COUNTER,
    "Generations that ran as one call of their pipeline with others that were equal but for prompt, seed and images.",
    WORKER,
)
EMBEDDING_HITS = _define(
    "engine_embedding_hits_total",
    Kind.COUNTER,
    "Calls of text encoders that were answered with what an earlier one came to.",
    WORKER,
)
LONE_CALLS = _define(
    "engine_lone_calls_total",
    Kind.COUNTER,
    "Component calls that ran alone, and why they were joined with no other.",
    WORKER
    | {
        "reason": "`unmatched` (nothing fitted), `verifying` (of a kind that is being tried), `forbidden`, "
        "`changed` (by a request that has changed its components), `unbatched` or `refused`"
    },
)
BATCH_STOPS = _define(
    "engine_batch_stops_total",
    Kind.COUNTER,
    "Batches, by why no more calls were joined.",
    WORKER
    | {
        "reason": "`unmatched` (no other pending call fitted), `full` (`max_joined`) or `times` (parts were measured "
        "to be faster, or a deadline would have passed)"
    },
)
BATCH_SIZE = _define(
    "batch_size", Kind.HISTOGRAM, "Component calls joined into one batch.", WORKER, buckets=BATCH_SIZES
)
KINDS = _define(
    "engine_kinds",
    Kind.GAUGE,
    "Kinds of component call that were tried joined.",
    WORKER | {"verdict": "`verified` where that came to the same as alone, `refused` where not"},
)
DEVICE_SECONDS = _define(
    "engine_device_seconds_total",
    Kind.COUNTER,
    "Time that batches took on the device, each counted once.",
    WORKER | {"phase": "as in `denoised_request_phase_seconds`"},
    unit="seconds",
)
STEP_TIME = _define(
    "denoise_step_seconds",
    Kind.HISTOGRAM,
    "Time between two denoising steps of a generation.",
    WORKER,
    unit="seconds",
    buckets=STEP_SECONDS,
)

# The journal

JOURNAL_WAITING = _define(
    "journal_changes_waiting", Kind.GAUGE, "Changes of what has to last that are not on the disk yet."
)
JOURNAL_LAG = _define(
    "journal_write_seconds",
    Kind.HISTOGRAM,
    "Time from when a change was asked for to when it was on the disk, or could not be written; callers wait for it.",
    unit="seconds",
    buckets=JOURNAL_SECONDS,
)
JOURNAL_FAILURES = _define("journal_failures_total", Kind.COUNTER, "Changes that could not be written.")

# The daemon

BUILD_INFO = _define(
    "build_info", Kind.GAUGE, "What is running; always 1.", {"version": "of denoised", "python": "version of Python"}
)
START_TIME = _define(
    "start_time_seconds", Kind.GAUGE, "When the daemon started, in seconds since the epoch.", unit="seconds"
)

DEFINITIONS = tuple(_ALL)
