"""What the front-end and a worker say to each other. Plain values, no torch.

A command is answered by events and ends well or with an error; closing it early cancels it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from denoised.values import Artifact, Plain

# What a worker is given at its start


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """What one worker needs to know.

    `device` is a torch name such as "cpu" or "cuda:0"; `threads` how many threads compute on a CPU; `budget` what
    weights may take, `working_set` what is kept for computing and `headroom` what nobody is promised, each in bytes or
    as a float share of the device's memory; a `budget` of None is what the other two leave of `part`, this worker's
    share of the device. `allow_dirs` are the directories that weights may be read from; `max_joined` the most requests
    that one batch may join; `verbose` turns DEBUG logging on; `log_format` is "text" or "json". `max_pixels` bounds
    each picture that is decoded. `allow_repos`, `pinned_revisions` and `allow_pickle` are the settings of these names.
    `embeddings_bytes` and `embeddings_ttl` too, in bytes and seconds.
    `host_memory` is what weights that have left the device may take of the host's memory, in bytes or as a share.
    `load_timeout` is the seconds that any load may take, `load_bytes_per_second` what more it is given for its bytes.
    `state_dir` is where digests of weight files are kept; empty where nothing outlives the daemon.
    """

    device: str
    threads: int
    budget: int | float | None
    allow_dirs: tuple[str, ...]
    state_dir: str
    max_joined: int
    verbose: bool
    log_format: str = "text"
    max_pixels: int = 16_777_216
    allow_repos: tuple[str, ...] = ()
    pinned_revisions: bool = False
    allow_pickle: bool = False
    embeddings_bytes: int = 1 << 26
    embeddings_ttl: float = 600.0
    working_set: int | float = 0.0
    headroom: int | float = 0.0
    part: float = 1.0
    host_memory: int | float = 0
    load_timeout: float = 600.0
    load_bytes_per_second: int = 2_000_000


# What to build


@dataclass(frozen=True, slots=True)
class ComponentSource:
    """Names one component; mirrors `denoised.v1.ComponentSource`.

    Its weights are in a repository, or it is the part `role` of a live `pipeline`, which is turned into the repository
    that it came from before it becomes part of a recipe, or it has no weights and is built from `config`. `class_name`
    is empty for the class that the repository names, `dtype` for the pipeline's own.
    """

    repo_id: str = ""
    subfolder: str = ""
    revision: str = ""
    variant: str = ""
    class_name: str = ""
    pipeline: str = ""
    role: str = ""
    config: Mapping[str, Plain] = field(default_factory=dict)
    dtype: str = ""
    use_safetensors: bool | None = None


# A tuple is several components in one role, as several ControlNets are.
Override = Plain | ComponentSource | tuple[ComponentSource, ...]


@dataclass(frozen=True, slots=True)
class Spec:
    """Names the weights, the class and the element type of a pipeline; mirrors `denoised.v1.PipelineSpec`.

    `task` is a name of `denoised.spec.TASKS`, or empty for the checkpoint's own class. `dtype` is a torch name such as
    "float16", or "auto" for that of the files; `component_dtypes` has those of single roles. `single_file` has all
    weights where it is not empty, and `config_source` what describes them; without one, so does `repo_id`.
    `quantization_config` is what `quantization.check` lets pass.
    """

    repo_id: str
    revision: str = ""
    variant: str = ""
    task: str = ""
    dtype: str = "float32"
    use_safetensors: bool | None = None
    overrides: Mapping[str, Override] = field(default_factory=dict)
    subfolder: str = ""
    component_dtypes: Mapping[str, str] = field(default_factory=dict)
    quantization_config: Mapping[str, Plain] = field(default_factory=dict)
    single_file: str = ""
    config_source: ComponentSource | None = None


@dataclass(frozen=True, slots=True)
class Derivation:
    """One application of `from_pipe`."""

    task: str
    overrides: Mapping[str, Override] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class NoiseScheduler:
    """What diffusers' `class_name.from_config(config, **overrides)` makes.

    An empty class and no configuration mean those of the pipeline's present noise scheduler.
    """

    class_name: str = ""
    config: Mapping[str, Plain] | None = None
    overrides: Mapping[str, Plain] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class AdapterSource:
    """Names the file of an adapter; without `weight_name` the one that diffusers would choose."""

    repo_id: str
    weight_name: str = ""
    subfolder: str = ""
    revision: str = ""


@dataclass(frozen=True, slots=True)
class AdapterCall:
    """One call of a diffusers method that changes a pipeline's adapters, such as "load_lora_weights".

    `sources` has its files, `arguments` everything else by name; components are named by their role.
    """

    method: str
    sources: tuple[AdapterSource, ...] = ()
    arguments: Mapping[str, Plain] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA that one request uses: a loaded one by name, or one from elsewhere.

    `scale` is a number, or numbers by component and block as `set_adapters` takes them.
    """

    name: str = ""
    source: AdapterSource | None = None
    scale: Plain = 1.0


@dataclass(frozen=True, slots=True)
class PipelineSettings:
    """What can be set on a live pipeline; what is not set is as the checkpoint has it.

    `features` are what diffusers has `enable_…` methods for, with their arguments.
    """

    noise_scheduler: NoiseScheduler | None = None
    adapters: tuple[AdapterCall, ...] = ()
    features: Mapping[str, Mapping[str, Plain]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Recipe:
    """All that is needed to build a pipeline again: what was loaded, what was derived from it, and what was set."""

    spec: Spec
    derivations: tuple[Derivation, ...] = ()
    settings: PipelineSettings = PipelineSettings()


@dataclass(frozen=True, slots=True)
class Access:
    """How one load may use the Hub. Not part of a recipe: a token is for the load that it came with."""

    token: str = field(default="", repr=False)
    local_files_only: bool = False
    force_download: bool = False


@dataclass(frozen=True, slots=True)
class Keep:
    """How the components of a pipeline are kept on the device.

    While it is `pinned` they never leave. After `keep_alive` seconds without a use they do even when nobody needs their
    room; None leaves them until somebody does.
    """

    pinned: bool = False
    keep_alive: float | None = None


# Commands. `pipeline` is a handle, "pipelines/{id}".


@dataclass(frozen=True, slots=True)
class Load:
    """Build a pipeline. Answered by LoadProgress, then Loaded. A cancelled load leaves nothing behind."""

    pipeline: str
    recipe: Recipe
    access: Access = Access()
    keep: Keep = Keep()


@dataclass(frozen=True, slots=True)
class Plan:
    """Say what loading a recipe would take, and load nothing. Answered by Planned."""

    recipe: Recipe
    access: Access = Access()


@dataclass(frozen=True, slots=True)
class Derive:
    """Build a pipeline from the components of a live one; without a derivation, a twin of it. Answered by Loaded.

    The settings are the new pipeline's, whatever those of the live one are by now.
    """

    pipeline: str
    source: str
    derivation: Derivation | None
    settings: PipelineSettings = PipelineSettings()
    access: Access = Access()
    keep: Keep = Keep()


@dataclass(frozen=True, slots=True)
class Update:
    """Give a live pipeline these settings, all of them. Answered by Loaded. One that fails changes nothing."""

    pipeline: str
    settings: PipelineSettings


@dataclass(frozen=True, slots=True)
class Callback:
    """A callback of the caller's, to be asked at the end of a step for these tensors.

    `period` is diffusers' `callback_steps`, for a family's legacy `callback`.
    """

    tensor_inputs: tuple[str, ...] = ()
    period: int = 1


@dataclass(frozen=True, slots=True)
class PreviewOptions:
    """A preview after every so many steps, its longer side so many pixels long."""

    step_interval: int
    size: int


@dataclass(frozen=True, slots=True)
class Generate:
    """Run a pipeline. Answered by PhaseBegan, Progress, Preview, Output and Finished; by StepEnd if a callback waits.

    `method` is "encode_prompt" to run that instead of `__call__`; what it returns comes as fields "output_0" and so on.

    `callbacks` are by the names of the parameters of `__call__` that take them; `conversation` names them in Replies.

    `arguments` are those of `__call__` by name, without generators, `output_type` and `return_dict`. `seeds` has one
    element or one per image; it is empty when `generators` (device, state) are given. `progress_interval` is the
    shortest time between two Progress events, in seconds. `adapters` are those to use instead of the pipeline's own;
    None leaves the pipeline's as they are. `client` shares the device evenly with other clients. `timeout` is what the
    caller's deadline leaves, in seconds.
    """

    pipeline: str
    arguments: Mapping[str, Plain]
    seeds: tuple[int, ...] = ()
    generators: tuple[tuple[str, bytes], ...] = ()
    output_type: str = ""
    media_type: str = "image/png"
    quality: int = 90
    frames_per_second: float | None = None
    forbid_batching: bool = False
    priority: int = 0
    noise_scheduler: NoiseScheduler | None = None
    progress_interval: float = 0.0
    adapters: tuple[Adapter, ...] | None = None
    callbacks: Mapping[str, Callback] = field(default_factory=dict)
    conversation: str = ""
    method: str = ""
    client: str = ""
    timeout: float | None = None
    preview: PreviewOptions | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """Let a generation that told of a StepEnd go on. Not answered.

    `tensors` are those that the callback changed, `state` the attributes of the pipeline that it set. A reply to a
    generation that has ended meanwhile is nothing.
    """

    conversation: str
    tensors: Mapping[str, Plain] = field(default_factory=dict)
    state: Mapping[str, Plain] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Hold:
    """Keep the components of a live pipeline like this from now on. Not answered."""

    pipeline: str
    keep: Keep


@dataclass(frozen=True, slots=True)
class Unload:
    """Let go of a pipeline. Answered by Unloaded. Its generations must have ended or been cancelled."""

    pipeline: str


@dataclass(frozen=True, slots=True)
class Watch:
    """Report Snapshots: at once, then changed ones every `interval` seconds, and before answers to (un)loads."""

    interval: float


@dataclass(frozen=True, slots=True)
class Beat:
    """Report a Heartbeat at once, and then every `interval` seconds."""

    interval: float


Command = Load | Plan | Derive | Update | Generate | Reply | Hold | Unload | Watch | Beat


# Events


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """How far a load is, in bytes; `role` is the component being worked on.

    `expected_end_time` of the phase is in seconds since the epoch, 0 while it cannot be told.
    """

    phase: str
    role: str
    completed_bytes: int
    total_bytes: int
    expected_end_time: float = 0.0


@dataclass(frozen=True, slots=True)
class Component:
    """One part of a pipeline; `digest` is empty and `weight_bytes` 0 for parts without weights."""

    role: str
    class_name: str
    digest: str = ""
    weight_bytes: int = 0
    dtype: str = ""


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a pipeline's `__call__`.

    `kinds` are the plain kinds its annotation allows ("none", "bool", "int", "float", "str", "list", "dict",
    "image", "ndarray", "tensor"); empty means any.
    """

    name: str
    annotation: str = ""
    kinds: frozenset[str] = frozenset()
    required: bool = False
    default: Plain = None
    has_default: bool = False


@dataclass(frozen=True, slots=True)
class LoadedAdapter:
    """A LoRA of a pipeline, with the SHA-256 of its file and the roles of the components that it has weights for."""

    name: str
    source: AdapterSource
    digest: str
    roles: tuple[str, ...]
    is_active: bool


@dataclass(frozen=True, slots=True)
class Loaded:
    """A pipeline is live.

    `revision` is the commit that the source resolved to; empty for directories. `recipe` is what was loaded and derived
    with every revision resolved, its settings left out. `settings` are those in force and `noise_scheduler` is the one
    in use, each with its whole configuration. `config` is the pipeline's own, `component_configs` are by role.
    """

    task: str
    pipeline_class: str
    components: tuple[Component, ...]
    parameters: tuple[Parameter, ...]
    revision: str = ""
    settings: PipelineSettings = PipelineSettings()
    noise_scheduler: NoiseScheduler | None = None
    adapters: tuple[LoadedAdapter, ...] = ()
    config: Mapping[str, Plain] = field(default_factory=dict)
    component_configs: Mapping[str, Mapping[str, Plain]] = field(default_factory=dict)
    encode_parameters: tuple[Parameter, ...] = ()
    callback_tensor_inputs: tuple[str, ...] = ()
    recipe: Recipe | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """A denoising step finished. When the end is expected, in seconds since the epoch, is for the front-end to add."""

    completed_steps: int
    total_steps: int
    expected_end_time: float | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class PhaseBegan:
    """What comes next is of this phase; so many steps are done. When the end is expected is as in Progress."""

    phase: str
    completed_steps: int
    expected_end_time: float | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Preview:
    """What an output, by its index, looks like after so many steps."""

    index: int
    completed_steps: int
    total_steps: int
    artifact: Artifact


@dataclass(frozen=True, slots=True)
class StepEnd:
    """A callback is asked, and the generation waits for its Reply.

    `state` has attributes of the pipeline object that runs, such as `guidance_scale`; those that begin with an
    underscore may be set.
    """

    callback: str
    step: int
    timestep: Plain
    tensors: Mapping[str, Plain]
    state: Mapping[str, Plain]


@dataclass(frozen=True, slots=True)
class Output:
    """One finished output; with its size in pixels where it is a picture."""

    field: str
    index: int
    artifact: Artifact
    seed: int | None = None
    group: int | None = None
    width: int = 0
    height: int = 0


@dataclass(frozen=True, slots=True)
class Phase:
    """What a run of a generation's component calls was for, and when it was; times are seconds since the epoch."""

    name: str
    start_time: float
    end_time: float


@dataclass(frozen=True, slots=True)
class Finished:
    """A generation ended; times in seconds.

    `phases` are in the order in which they began; `batch_sizes` has calls by how many requests shared them;
    `generators` are the advanced states, where states were sent; `fields` what the pipeline returned beside media, and
    `field_names` all that it returned, in order. For the manifest: `noise_scheduler` where the request brought one,
    `media` the kind and digest of each image or tensor by its place among the arguments, `adapter_digests` those of the
    files that the request named, in its order.
    `recoveries` are the ways in which calls came through that had run out of memory.
    """

    run_seconds: float
    device_seconds: float
    encode_seconds: float
    calls: int
    joined_calls: int
    max_joined: int
    steps: int = 0
    generators: tuple[tuple[str, bytes], ...] = ()
    fields: Mapping[str, Plain] = field(default_factory=dict)
    field_names: tuple[str, ...] = ()
    noise_scheduler: NoiseScheduler | None = None
    media: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    adapter_digests: tuple[str, ...] = ()
    phases: tuple[Phase, ...] = ()
    batch_sizes: tuple[tuple[int, int], ...] = ()

    def phase_seconds(self) -> dict[str, float]:
        """Seconds in each phase by its name, encoding included."""
        seconds = {phase.name: 0.0 for phase in self.phases}
        for phase in self.phases:
            seconds[phase.name] += phase.end_time - phase.start_time
        return seconds | {"encode": self.encode_seconds}

    recoveries: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Unloaded:
    """A pipeline is gone; bytes of weights that nobody needs any more."""

    freed_bytes: int


@dataclass(frozen=True, slots=True)
class Ready:
    """A worker is up. The first thing it says, on no command's behalf."""

    pid: int
    host: str
    device: str
    device_name: str
    library_versions: Mapping[str, str]
    embedded_models: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Histogram:
    """Observations since the worker started: how many fell at or below each upper bound, all of them, and their sum."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    count: int
    sum: float


@dataclass(frozen=True, slots=True)
class HeldComponent:
    """One component in the store, with the handles that use it."""

    digest: str
    class_name: str
    weight_bytes: int
    pipelines: tuple[str, ...]
    residency: str = "device"


@dataclass(frozen=True, slots=True)
class MethodStats:
    """What became of the calls of one component method; `lone_calls` by the reason why they were not joined.

    Differences between joined and lone results are in units of the tolerance; None where there was no such kind.
    """

    method: str
    calls: int
    joined_calls: int
    lone_calls: Mapping[str, int]
    verified_kinds: int
    refused_kinds: int
    agreed_difference: float | None
    refused_difference: float | None


@dataclass(frozen=True, slots=True)
class PlannedComponent:
    """A component that a pipeline would have. `file_bytes` has the bytes in its files by safetensors' element types."""

    role: str
    class_name: str
    digest: str
    weight_bytes: int
    dtype: str
    file_bytes: Mapping[str, int]
    is_held: bool


class Outcome(StrEnum):
    """Whether there is room for what is planned; mirrors `denoised.v1.PlanPipelineResponse.Outcome`."""

    FITS = "fits"
    EVICTS = "evicts"
    TAKES_TURNS = "takes turns"
    NO_ROOM = "no room"
    NEVER_FITS = "never fits"


@dataclass(frozen=True, slots=True)
class Planned:
    """What loading a recipe would take; sizes in bytes. `evicted` would leave the device to make room."""

    outcome: Outcome
    components: tuple[PlannedComponent, ...]
    new_bytes: int
    shared_bytes: int
    free_bytes: int
    evictable_bytes: int
    budget_bytes: int
    evicted: tuple[HeldComponent, ...]
    download_bytes: int
    load_seconds: float


@dataclass(frozen=True, slots=True)
class MemoryStats:
    """What a device's memory is used for beside weights, in bytes, and what became of it since its worker started.

    Calls work in `working_set_bytes` now, of which `working_set_budget_bytes` are theirs for sure; the allocator keeps
    `cached_bytes` that were freed; nobody on the machine uses `free_bytes`; nobody is promised `headroom_bytes`;
    `evictable_bytes` of weights are idle and may go. `unaccounted_bytes` were in use and in no book when the worker was
    idle last, `unreclaimed_bytes` are of components that were let go of and are still there. `evictions` counts by
    reason and by the tier that was left, `recoveries` counts by the rung that helped a call which ran out of memory.
    `estimate_ratios` observes what was measured over what was estimated, of "weights" and of the "working_set".
    `arrivals` observes by tier the seconds that bringing a component from there took, `arrived_bytes` counts its bytes.
    """

    working_set_bytes: int = 0
    working_set_budget_bytes: int = 0
    headroom_bytes: int = 0
    cached_bytes: int = 0
    free_bytes: int = 0
    evictable_bytes: int = 0
    unaccounted_bytes: int = 0
    unreclaimed_bytes: int = 0
    evictions: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    eviction_ages: Histogram | None = None
    recoveries: Mapping[str, int] = field(default_factory=dict)
    estimate_ratios: Mapping[str, Histogram] = field(default_factory=dict)
    arrivals: Mapping[str, Histogram] = field(default_factory=dict)
    arrived_bytes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """How a worker is; counts are since it started, sizes in bytes.

    `batch_sizes` observes how many requests' calls each batch joined, `step_seconds` the time between denoising steps
    of a request, `device_seconds` has what batches took by the phase that they were of. `fused_requests` ran as one
    `__call__` with others; kinds of request are fusible or not once it was proven. `embedding_hits` are calls of text
    encoders that were answered with what is kept, `embedding_bytes` what that takes. `batch_stops` counts batches by
    why no more calls were joined.
    """

    total_bytes: int
    budget_bytes: int
    weight_bytes: int
    reserved_bytes: int
    process_bytes: int
    components: tuple[HeldComponent, ...]
    calls: int
    batches: int
    joined_calls: int
    verified_kinds: int
    refused_kinds: int
    batch_sizes: Histogram
    step_seconds: Histogram
    methods: tuple[MethodStats, ...] = ()
    device_seconds: Mapping[str, float] = field(default_factory=dict)
    memory: MemoryStats = MemoryStats()
    batch_stops: Mapping[str, int] = field(default_factory=dict)
    fused_requests: int = 0
    fusible_kinds: int = 0
    unfusible_kinds: int = 0
    embedding_hits: int = 0
    embedding_bytes: int = 0

    @property
    def shared_saved_bytes(self) -> int:
        """What more would be held if nothing were shared; of what is only on disk nothing would."""
        held = [part for part in self.components if part.pipelines and part.residency != "disk"]
        return sum(part.weight_bytes * (len(part.pipelines) - 1) for part in held)


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """A worker lives; its engine has been in its present turn for so many seconds, 0 while it has nothing to do."""

    turn_seconds: float


Event = (
    LoadProgress
    | Loaded
    | Planned
    | Progress
    | PhaseBegan
    | Preview
    | StepEnd
    | Output
    | Finished
    | Unloaded
    | Snapshot
    | Heartbeat
)


# Ends


@dataclass(frozen=True, slots=True)
class Done:
    """The command ended well."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The command ended with an error, which is a DenoisedError."""

    error: Exception


End = Done | Failed
