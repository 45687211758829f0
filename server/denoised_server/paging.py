"""Pages of a list whose items may come and go between two requests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from denoised.errors import InvalidFieldError

T = TypeVar("T")

DEFAULT_SIZE = 50
MAX_SIZE = 500


def page(items: Sequence[T], *, key: Callable[[T], int], size: int, token: str) -> tuple[list[T], str]:
    """One page of items, and the token of the next page, empty after the last. Keys rise and are not negative."""
    if size < 0:
        raise InvalidFieldError.of("page_size", f"{size} is negative.", hint="Leave it unset for the default.")
    last = _parse(token) if token else -1
    rest = [item for item in items if key(item) > last]
    size = min(size or DEFAULT_SIZE, MAX_SIZE)
    return rest[:size], f"{key(rest[size - 1]):x}" if len(rest) > size else ""


def _parse(token: str) -> int:
    try:
        return int(token, 16)
    except ValueError as error:
        raise InvalidFieldError.of(
            "page_token", "it is not one of ours.", hint="Send the next_page_token of the page before."
        ) from error
