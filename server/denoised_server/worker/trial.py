"""A computation that may run out of memory, and what came of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from .inputs import Inputs
from .ladder import Rung
from .seam import Method


class Trial(NamedTuple):
    """A component's computation for one request or several, of so many samples; `compute` may be called again.

    `is_exact` says that a request was promised the bits of a run alone.
    """

    method: Method
    requests: int
    rows: int
    inputs: Inputs
    is_exact: bool
    compute: Callable[[], Any]


class Tried(NamedTuple):
    """What a computation returned or raised, and the rung without which it would have failed.

    `apart` says of such an error that there is no memory for all requests together, and how to go on with fewer.
    `lacking` is how many bytes were needed at least, where memory ran out and nothing has helped yet.
    """

    value: Any = None
    error: BaseException | None = None
    helped: Rung | None = None
    apart: Rung | None = None
    lacking: int | None = None
