"""What is done to a pipeline's adapters: diffusers' own calls, with contents in place of names.

Two pipelines that load the same file under two names do the same. A step therefore calls an adapter by its content,
and has a key that is equal for steps that come to the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from denoised.errors import AdapterMismatchError, AdapterNotFoundError, InvalidFieldError
from denoised_server.messages import Adapter, AdapterCall, AdapterSource

LORA = frozenset(
    {
        "load_lora_weights",
        "set_adapters",
        "fuse_lora",
        "unfuse_lora",
        "unload_lora_weights",
        "delete_adapters",
        "enable_lora",
        "disable_lora",
    }
)
TEXTUAL_INVERSION = frozenset({"load_textual_inversion", "unload_textual_inversion"})
IP_ADAPTER = frozenset({"load_ip_adapter", "set_ip_adapter_scale", "unload_ip_adapter"})
# Without any of these, adapters that are not active leave no trace.
LASTING = frozenset({"fuse_lora", "unfuse_lora"})


@dataclass(frozen=True, slots=True)
class File:
    """The file of an adapter."""

    path: Path
    digest: str
    revision: str = ""

    @property
    def size(self) -> int:
        return self.path.stat().st_size


@dataclass(frozen=True, slots=True)
class Step:
    """One call of a diffusers method. `name` is the content name of a LoRA that it loads."""

    method: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    files: tuple[File, ...] = ()
    name: str = ""
    sources: tuple[AdapterSource, ...] = ()

    @property
    def key(self) -> str:
        """Equal for steps that do the same to the same."""
        said = [self.method, self.name, [file.digest for file in self.files], self.arguments]
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Loaded:
    """A LoRA that is loaded: what its user calls it, what it is called by content, and its file."""

    name: str
    content: str
    source: AdapterSource
    file: File


@dataclass(frozen=True, slots=True)
class Adaptation:
    """All that was done to a pipeline's adapters."""

    steps: tuple[Step, ...] = ()
    loras: tuple[Loaded, ...] = ()

    def after(self, calls: Iterable[AdapterCall], find: Callable[[AdapterSource], File]) -> Adaptation:
        """What it is once these calls were made too. `find` resolves sources to files.

        Raises AdapterNotFoundError, InvalidFieldError and what `find` raises.
        """
        done = self
        for call in calls:
            done = done._after(call, find)
        return done

    def using(self, adapters: Sequence[Adapter], find: Callable[[AdapterSource], File]) -> Adaptation:
        """What it is for a request that uses these LoRAs in place of those that are active."""
        if not adapters and not any(step.method in LASTING for step in self.steps):
            return Adaptation(_without_lora(self.steps))
        if any(step.method in LASTING for step in self.steps) and self.loras and adapters:
            raise AdapterMismatchError(
                "The pipeline's adapters are fused and still loaded: others would have no effect.",
                hint="Call unload_lora_weights, which leaves what is fused, or unfuse_lora.",
            )
        done, contents = self, list[str]()
        for adapter in adapters:
            if adapter.source is None:
                contents.append(done._content(adapter.name))
                continue
            file = find(adapter.source)
            known = next((lora.content for lora in done.loras if lora.file.digest == file.digest), None)
            if known is None:
                call = AdapterCall("load_lora_weights", (adapter.source,), {"adapter_name": f"request_{file.digest}"})
                done = done._after(call, find)
                known = done.loras[-1].content
            contents.append(known)
        if len(set(contents)) < len(contents):
            raise InvalidFieldError.of("adapters", "one of them is named twice.", hint="Add up their scales.")
        if not contents:
            return done
        weights = [adapter.scale for adapter in adapters]
        step = Step("set_adapters", {"adapter_names": contents, "adapter_weights": weights})
        return replace(done, steps=_minimal((*done.steps, step)))

    def _after(self, call: AdapterCall, find: Callable[[AdapterSource], File]) -> Adaptation:
        arguments = dict(call.arguments)
        files = tuple(find(source) for source in call.sources)
        loras = self.loras
        content = ""
        match call.method:
            case "load_lora_weights":
                name = str(arguments.pop("adapter_name", None) or f"default_{len(loras)}")
                if any(lora.name == name for lora in loras):
                    raise InvalidFieldError.of(
                        "adapter_name", f"{name!r} is in use.", hint="Choose another, or delete that adapter first."
                    )
                content = _content_name(files[0].digest, {lora.content for lora in loras})
                loras = (*loras, Loaded(name, content, call.sources[0], files[0]))
            case "unload_lora_weights":
                loras = ()
            case "delete_adapters":
                gone = {self._content(name) for name in _names(arguments["adapter_names"])}
                loras = tuple(lora for lora in loras if lora.content not in gone)
            case "load_ip_adapter" | "load_textual_inversion":
                pass
            case _ if call.method not in LORA | TEXTUAL_INVERSION | IP_ADAPTER:
                raise InvalidFieldError.of("adapters", f"{call.method!r} is no method for adapters.")
        if arguments.get("adapter_names") is not None:
            arguments["adapter_names"] = [self._content(name) for name in _names(arguments["adapter_names"])]
        step = Step(call.method, arguments, files, content, call.sources)
        return Adaptation(_minimal((*self.steps, step)), loras)

    def _content(self, name: str) -> str:
        for lora in self.loras:
            if lora.name == name:
                return lora.content
        there = ", ".join(repr(lora.name) for lora in self.loras)
        raise AdapterNotFoundError(
            f"The pipeline has no adapter {name[:64]!r}.",
            hint=f"It has {there}." if there else "Load one with load_lora_weights.",
        )


def _content_name(digest: str, taken: Iterable[str]) -> str:
    # Not a hexadecimal number alone: PEFT looks for names inside those of layers, where digits occur.
    name = f"sha{digest[:24]}"
    count = sum(other.startswith(name) for other in taken)
    return f"{name}x{count}" if count else name


def _names(value: Any) -> list[str]:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise InvalidFieldError.of("adapter_names", "it is neither a name nor a list of names.")
    return list(names)


def _without_lora(steps: Sequence[Step]) -> tuple[Step, ...]:
    return tuple(step for step in steps if step.method not in LORA)


def _minimal(steps: Sequence[Step]) -> tuple[Step, ...]:
    """Fewer steps that come to the same, so that what is equal looks equal and nothing grows for ever."""
    last, before = steps[-1], steps[:-1]
    if before and last.method == before[-1].method and last.method in ("set_adapters", "set_ip_adapter_scale"):
        before = before[:-1]
    if last.method in LORA and not any(step.method in LASTING for step in before):
        if last.method == "unload_lora_weights":
            return _without_lora(before)
        others = _without_lora(before)
        is_enabled = not any(step.method == "disable_lora" for step in before)
        if last.method == "set_adapters" and is_enabled and not others:
            used = set(last.arguments["adapter_names"])
            loads = [step for step in before if step.method == "load_lora_weights" and step.name in used]
            return (*sorted(loads, key=lambda step: step.key), last)
    return (*before, last)
