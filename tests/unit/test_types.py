"""What user code may and may not say, under `mypy --strict`: both clients are typed as they work.

`user_code/*.py` are programs of users. Lines that must not type-check end with `# error:` and mypy's codes.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from mypy import api

ROOT = Path(__file__).parents[2]
PROGRAMS = sorted((Path(__file__).parent / "user_code").glob("*.py"))
EXPECTED = re.compile(r"# error: ([\w, -]+)$", re.MULTILINE)
FOUND = re.compile(r"^(.+?):(\d+)(?::\d+)?: error: .*\[([\w-]+)\]$", re.MULTILINE)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> set[tuple[str, int, str]]:
    """File, line and code of each error."""
    # A configuration of its own: what this project allows itself is nothing to its users.
    config = tmp_path_factory.mktemp("mypy") / "mypy.ini"
    config.write_text(f"[mypy]\nmypy_path = {ROOT / 'client'}\n[mypy-denoised.*]\nfollow_imports = silent\n")
    cache = ROOT / ".mypy_cache" / "user_code"
    options = ["--strict", "--config-file", str(config), "--cache-dir", str(cache), "--no-error-summary"]
    out, failure, _ = api.run([*options, *map(str, PROGRAMS)])
    assert not failure
    errors = FOUND.findall(out)
    assert len(errors) == out.count(": error: "), out
    return {(Path(file).name, int(line), code) for file, line, code in errors}


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_user_code_type_checks_where_it_is_right_and_nowhere_else(
    program: Path, found: set[tuple[str, int, str]]
) -> None:
    lines = enumerate(program.read_text().splitlines(), 1)
    expected = {
        (number, code) for number, line in lines if (match := EXPECTED.search(line)) for code in match[1].split(", ")
    }
    assert {(line, code) for file, line, code in found if file == program.name} == expected


def test_there_is_right_and_wrong_user_code_for_both_clients() -> None:
    assert {path.stem for path in PROGRAMS} == {"right_asyncio", "right_blocking", "wrong_asyncio", "wrong_blocking"}
    for path in PROGRAMS:
        assert bool(EXPECTED.search(path.read_text())) == path.stem.startswith("wrong")
