"""What may be done to a pipeline's adapters: diffusers' own calls, checked, and no more of them than it takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from denoised.errors import InvalidFieldError
from denoised.values import Plain

from .messages import AdapterCall

MAX_CALLS = 128
MAX_NAME = 64
# Methods with the arguments that they take beside files.
METHODS: Mapping[str, frozenset[str]] = {
    "load_lora_weights": frozenset({"adapter_name"}),
    "set_adapters": frozenset({"adapter_names", "adapter_weights"}),
    "fuse_lora": frozenset({"components", "lora_scale", "safe_fusing", "adapter_names"}),
    "unfuse_lora": frozenset({"components"}),
    "unload_lora_weights": frozenset(),
    "delete_adapters": frozenset({"adapter_names"}),
    "enable_lora": frozenset(),
    "disable_lora": frozenset(),
    "load_textual_inversion": frozenset({"token", "tokenizer", "text_encoder"}),
    "unload_textual_inversion": frozenset({"tokens", "tokenizer", "text_encoder"}),
    "load_ip_adapter": frozenset({"image_encoder_folder"}),
    "set_ip_adapter_scale": frozenset({"scale"}),
    "unload_ip_adapter": frozenset(),
}
NEEDED: Mapping[str, frozenset[str]] = {
    "set_adapters": frozenset({"adapter_names"}),
    "delete_adapters": frozenset({"adapter_names"}),
    "set_ip_adapter_scale": frozenset({"scale"}),
}
FILES: Mapping[str, range] = {
    "load_lora_weights": range(1, 2),
    "load_textual_inversion": range(1, 2),
    "load_ip_adapter": range(1, 9),
}
NO_FILES = range(1)
FUSING = frozenset({"fuse_lora", "unfuse_lora"})
LORA = frozenset(name for name in METHODS if "lora" in name) | {"set_adapters", "delete_adapters"}
IP_ADAPTER = frozenset({"load_ip_adapter", "set_ip_adapter_scale", "unload_ip_adapter"})
UNLOADING = {"unload_lora_weights": LORA, "unload_ip_adapter": IP_ADAPTER}


def check(call: AdapterCall, field: str) -> None:
    """Raises InvalidFieldError for what no pipeline could do."""
    if call.method not in METHODS:
        raise InvalidFieldError.of(
            f"{field}.method", f"{call.method[:MAX_NAME]!r} is not known.", hint=f"Send one of {', '.join(METHODS)}."
        )
    for name in call.arguments:
        if name not in METHODS[call.method]:
            known = ", ".join(sorted(METHODS[call.method])) or "none"
            raise InvalidFieldError.of(
                f"{field}.arguments", f"{call.method} takes no {name[:MAX_NAME]!r}.", hint=f"It takes {known}."
            )
    for name in NEEDED.get(call.method, ()):
        if name not in call.arguments:
            raise InvalidFieldError.of(f"{field}.arguments", f"{call.method} needs {name!r}.")
    if len(call.sources) not in FILES.get(call.method, NO_FILES):
        raise InvalidFieldError.of(f"{field}.sources", f"{call.method} does not take {len(call.sources)} of them.")
    for name, value in call.arguments.items():
        CHECKS.get(name, _any)(value, f"{field}.arguments[{name}]")


def scale(value: Plain, field: str) -> None:
    """Numbers, by component and block where there are several. Raises InvalidFieldError for anything else."""
    match value:
        case bool():
            pass
        case int() | float() if math.isfinite(value):
            return
        case list() | tuple():
            for item in value:
                scale(item, field)
            return
        case Mapping():
            for name, item in value.items():
                scale(item, f"{field}[{name[:MAX_NAME]}]")
            return
    raise InvalidFieldError.of(
        field, "it is no finite number.", hint="Send a number, or numbers by component and block."
    )


def compact(calls: Sequence[AdapterCall]) -> tuple[AdapterCall, ...]:
    """Fewer calls that come to the same. Raises InvalidFieldError when too many are left."""
    kept: list[AdapterCall] = []
    for call in calls:
        kept = _before(kept, call)
        # What unloads everything of a kind needs something of that kind.
        kind = UNLOADING.get(call.method)
        if kind is None or any(each.method in kind for each in kept):
            kept.append(call)
    if len(kept) > MAX_CALLS:
        raise InvalidFieldError.of(
            "settings.adapters", f"{len(kept)} calls are too many.", hint="Unload the adapters and begin anew."
        )
    return tuple(kept)


def _before(calls: Sequence[AdapterCall], last: AdapterCall) -> list[AdapterCall]:
    """The calls of which something is left after one more."""
    is_fused = any(call.method in FUSING for call in calls)
    match last.method:
        case "unload_lora_weights" if not is_fused:
            return [call for call in calls if call.method not in LORA]
        case "set_adapters" if not is_fused:
            deleted = {name for call in calls if call.method == "delete_adapters" for name in _names(call)}
            return [
                call
                for call in calls
                if call.method not in ("set_adapters", "delete_adapters")
                and not (call.method == "load_lora_weights" and call.arguments.get("adapter_name") in deleted)
            ]
        case "enable_lora" | "disable_lora" if not is_fused:
            return [call for call in calls if call.method not in ("enable_lora", "disable_lora")]
        case "set_ip_adapter_scale":
            return [call for call in calls if call.method != last.method]
        case "unload_ip_adapter":
            return [call for call in calls if call.method not in IP_ADAPTER]
    return list(calls)


def _names(call: AdapterCall) -> list[Plain]:
    names = call.arguments["adapter_names"]
    return list(names) if isinstance(names, list | tuple) else [names]


def _any(value: Plain, field: str) -> None:
    pass


def _text(value: Plain, field: str) -> None:
    if value is not None and not (isinstance(value, str) and 0 < len(value) <= MAX_NAME):
        raise InvalidFieldError.of(field, "it is no name.", hint=f"Send 1 to {MAX_NAME} characters.")


def _texts(value: Plain, field: str) -> None:
    for item in value if isinstance(value, list | tuple) else [value]:
        _text(item, field)


def _weights(value: Plain, field: str) -> None:
    """As `set_adapters` takes them: one for all, or one for each, of which None means 1."""
    for item in value if isinstance(value, list | tuple) else [value]:
        if item is not None:
            scale(item, field)


def _number(value: Plain, field: str) -> None:
    if isinstance(value, Mapping | list | tuple):
        raise InvalidFieldError.of(field, "it is no number.")
    scale(value, field)


CHECKS: Mapping[str, Callable[[Plain, str], None]] = {
    "adapter_name": _text,
    "adapter_names": _texts,
    "adapter_weights": _weights,
    "components": _texts,
    "lora_scale": _number,
    "scale": scale,
    "token": _texts,
    "tokens": _texts,
    "tokenizer": _text,
    "text_encoder": _text,
    "image_encoder_folder": _text,
}
