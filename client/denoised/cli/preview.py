"""Previews in a terminal: each character is two pixels, an upper half block and what is behind it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from rich.color import Color
from rich.console import Console, Group
from rich.live import Live
from rich.style import Style
from rich.text import Text

from ..preview import OnPreview, Preview

# Pixels of the longer side, and so characters of a line.
SIZE = 48
# Terminals with fewer colours show nothing that could be recognised.
COLOURS = ("256", "truecolor")


@contextlib.contextmanager
def live(console: Console) -> Iterator[OnPreview | None]:
    """Shows the previews that what is yielded is called with, until the block ends. None where a terminal cannot."""
    if not console.is_terminal or console.color_system not in COLOURS:
        yield None
        return
    latest: dict[int, Preview] = {}
    with Live(console=console, transient=True) as screen:

        def show(preview: Preview) -> None:
            latest[preview.index] = preview
            steps = Text(f"step {preview.completed_steps} of {preview.total_steps}", style="dim")
            screen.update(Group(*(picture(latest[index]) for index in sorted(latest)), steps))

        yield show


def picture(preview: Preview) -> Text:
    image = preview.image.convert("RGB")
    width, height = image.size
    rows = height // 2 * 2
    # Row by row, red, green and blue.
    data = image.tobytes()
    colours = [Color.from_rgb(*data[start : start + 3]) for start in range(0, 3 * width * rows, 3)]
    text = Text()
    for row in range(0, rows, 2):
        upper, lower = colours[row * width : (row + 1) * width], colours[(row + 1) * width : (row + 2) * width]
        for above, below in zip(upper, lower, strict=True):
            text.append("▀", Style(color=above, bgcolor=below))
        text.append("\n")
    return text
