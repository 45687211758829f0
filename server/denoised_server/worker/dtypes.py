"""Element types that weights are held in: one for all components, their own, or one for each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from denoised.errors import InvalidFieldError
from denoised_server.messages import Spec


@dataclass(frozen=True, slots=True)
class Dtypes:
    """`default` is None for the element type of each component's files."""

    default: torch.dtype | None
    by_role: Mapping[str, torch.dtype]

    @classmethod
    def of_spec(cls, spec: Spec) -> Dtypes:
        """Raises InvalidFieldError for what weights cannot be held in."""
        default = None if spec.dtype == "auto" else _dtype(spec.dtype, "spec.dtype")
        roles = spec.component_dtypes.items()
        return cls(default, {role: _dtype(name, f"spec.component_dtypes[{role}]") for role, name in roles})

    def of(self, role: str) -> torch.dtype | None:
        return self.by_role.get(role.partition("[")[0], self.default)

    def check_roles(self, roles: Iterable[str]) -> None:
        """Raises InvalidFieldError for a role that the pipeline does not have."""
        known = {role.partition("[")[0] for role in roles}
        for role in self.by_role:
            if role not in known:
                raise InvalidFieldError.of(
                    f"spec.component_dtypes[{role[:80]}]",
                    "the pipeline has no component of this name.",
                    hint=f"It has {', '.join(sorted(known))}.",
                )


def _dtype(name: str, field: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InvalidFieldError.of(
            field, f"weights cannot be held as {name[:80]!r}.", hint="Use float32, float16 or bfloat16."
        )
    return dtype
