"""The table of families and tasks: `python -m tests.parity.table` writes it into docs/families.md."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from denoised_server.worker.families import MAPPINGS

from .checkpoints import FAMILIES, NOT_BUILT
from .checkpoints.family import Family

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
JOINING = PAGE.with_name("coalescing.md")
# Words in the names of the suite's tests: alone, together, callbacks, prompts, left in the middle.
SIGNS = {"alone": "=", "together": "+", "callback": "c", "prompts": "p", "left": "l"}
START, END = "<!-- table: written by tests/parity/table.py -->", "<!-- end of table -->"


def rows(cell: Callable[[Family, str], str]) -> list[list[str]]:
    """A line of headings, then one line for each checkpoint of the suite."""
    lines = [["family", *MAPPINGS]]
    for family in FAMILIES:
        tasks = family.mapped()
        name = f"{family} ({family.needs})" if family.needs else str(family)
        lines.append([name, *(cell(family, task) if task in tasks else "" for task in MAPPINGS)])
    return lines


def promise(family: Family, task: str) -> str:
    """What the suite asserts of it."""
    return f"= · {family.tolerance:g}"


def page() -> str:
    """The two tables of the page."""
    heading, *lines = rows(promise)
    text = [_line(heading), _line(["---"] * len(heading)), *map(_line, lines), ""]
    text += [_line(["family without a checkpoint", "tasks", "why"]), _line(["---"] * 3)]
    for name, reason in sorted(NOT_BUILT.items()):
        tasks = ", ".join(task for task, mapping in MAPPINGS.items() if name in mapping)
        text.append(_line([name, tasks, reason]))
    return "\n".join(text)


def joining() -> Mapping[str, frozenset[str]]:
    """The methods that the docs say are joined, by checkpoint of the suite; nothing for one that they leave out."""
    found: dict[str, frozenset[str]] = defaultdict(frozenset)
    for family, methods in re.findall(r"^\| (.+?) \| (.+?) \|.*\|$", JOINING.read_text(), re.MULTILINE):
        found[family] = frozenset(re.findall(r"(\w+\.\w+) \d+%", methods))
    return found


def written(text: str) -> str:
    """The page with its tables made anew."""
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n\n{page()}\n\n{END}{after}"


def outcome(reports: Iterable[tuple[str, str]]) -> list[str]:
    """What became of the suite's tests, by id and outcome, as `SIGNS` has them; "✗" for what failed."""
    marks: dict[str, str] = {}
    for name, result in reports:
        test, _, case = name.partition("[")
        if case:
            mark = "✗" if result != "passed" else next(sign for word, sign in SIGNS.items() if word in test)
            marks[case[:-1]] = marks.get(case[:-1], "") + mark
    lines = rows(lambda family, task: marks.get(f"{family}-{task}", ""))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
