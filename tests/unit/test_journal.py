"""The journal: what was awaited is there, what failed is not, and damage is one sentence."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from denoised.errors import JournalUnavailableError
from denoised_server import journal as journal_module
from denoised_server.journal import FILE, Journal, JournalError
from denoised_server.messages import Recipe, Spec
from denoised_server.observer import Observer

KEPT: dict[str, Any] = {"number": 1, "recipe": Recipe(Spec("weights")), "last_use_time": 5.0}


async def contents(state_dir: Path) -> tuple[dict[str, Any], list[str]]:
    """What the next process finds."""
    journal = Journal(state_dir)
    found = dict(await journal.pipelines()), await journal.unloaded()
    await journal.close()
    return found


async def test_what_was_kept_is_there_for_the_next_process(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    await journal.keep_pipeline("pipelines/a", KEPT)
    await journal.keep_pipeline("pipelines/b", KEPT)
    await journal.forget_pipeline("pipelines/b")
    await journal.note_uses({"pipelines/a": 9.0, "pipelines/b": 9.0})
    await journal.close()
    assert await contents(tmp_path) == ({"pipelines/a": KEPT | {"last_use_time": 9.0}}, ["pipelines/b"])


async def test_changes_are_made_in_the_order_in_which_they_were_asked(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    asked = [
        change("pipelines/a")
        for _ in range(50)
        for change in (lambda name: journal.keep_pipeline(name, KEPT), journal.forget_pipeline)
    ]
    await asyncio.gather(*asked)
    await journal.close()
    assert await contents(tmp_path) == ({}, ["pipelines/a"])


async def test_a_change_whose_asker_left_is_made_all_the_same(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    asker = asyncio.create_task(journal.keep_pipeline("pipelines/a", KEPT))
    await asyncio.sleep(0)
    asker.cancel()
    await journal.close()
    assert list((await contents(tmp_path))[0]) == ["pipelines/a"]


async def test_one_that_cannot_be_written_harms_no_other(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    bad = journal.keep_pipeline("pipelines/bad", KEPT | {"recipe": object()})
    results = await asyncio.gather(journal.keep_pipeline("pipelines/a", KEPT), bad, return_exceptions=True)
    assert results[0] is None
    assert isinstance(results[1], TypeError)
    await journal.close()
    assert list((await contents(tmp_path))[0]) == ["pipelines/a"]


async def test_a_locked_journal_says_so_and_works_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "BUSY_SECONDS", 0.01)
    journal = Journal(tmp_path)
    with closing(sqlite3.connect(tmp_path / FILE, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(JournalUnavailableError, match="locked") as caught:
            await journal.keep_pipeline("pipelines/a", KEPT)
        assert caught.value.retry_after
        assert str(tmp_path) not in str(caught.value)
        other.execute("ROLLBACK")
    await journal.keep_pipeline("pipelines/b", KEPT)
    await journal.close()
    assert list((await contents(tmp_path))[0]) == ["pipelines/b"]


async def test_a_full_disk_says_so_and_keeps_what_there_was(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    await journal.keep_pipeline("pipelines/a", KEPT)
    # As SQLite itself says it: no more pages than there are.
    journal._connection.execute("PRAGMA max_page_count = 1")
    with pytest.raises(JournalUnavailableError, match="full"):
        await journal.keep_pipeline("pipelines/b", KEPT | {"source": "x" * 100_000})
    await journal.close()
    assert list((await contents(tmp_path))[0]) == ["pipelines/a"]


async def test_only_the_daemons_user_can_read_it(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    await journal.keep_pipeline("pipelines/a", KEPT)
    files = [tmp_path / name for name in ("journal.sqlite3", "journal.sqlite3-wal", "journal.sqlite3-shm")]
    assert all(file.stat().st_mode & 0o077 == 0 for file in files)
    await journal.close()


async def test_two_daemons_cannot_share_a_directory(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    with pytest.raises(JournalError, match="in use by another daemon"):
        Journal(tmp_path)
    await journal.close()
    await Journal(tmp_path).close()


@pytest.mark.parametrize("damage", [b"this is no database, and was never meant to be one", b""])
async def test_a_damaged_file_is_one_sentence_that_says_what_to_do(tmp_path: Path, damage: bytes) -> None:
    journal = Journal(tmp_path)
    await journal.keep_pipeline("pipelines/a", KEPT)
    await journal.close()
    file = tmp_path / FILE
    whole = file.read_bytes()
    file.write_bytes(damage or whole[:5000] + b"\xff" * 3000)
    with pytest.raises(JournalError, match="Move it away"):
        Journal(tmp_path)


async def test_a_journal_of_a_newer_daemon_is_left_alone(tmp_path: Path) -> None:
    await Journal(tmp_path).close()
    with closing(sqlite3.connect(tmp_path / FILE)) as file:
        file.execute(f"PRAGMA user_version = {len(journal_module.MIGRATIONS) + 1}")
    with pytest.raises(JournalError, match="newer"):
        Journal(tmp_path)


@pytest.mark.parametrize("version", range(len(journal_module.MIGRATIONS)))
async def test_a_journal_of_each_older_version_is_brought_up_to_date(tmp_path: Path, version: int) -> None:
    with closing(sqlite3.connect(tmp_path / FILE, isolation_level=None)) as file:
        for script in journal_module.MIGRATIONS[:version]:
            file.executescript(script)
        file.execute(f"PRAGMA user_version = {version}")
        if version:
            file.execute("INSERT INTO pipelines VALUES ('pipelines/a', 5.0, '{\"number\": 1}')")
    found, _ = await contents(tmp_path)
    assert list(found) == (["pipelines/a"] if version else [])


async def test_in_memory_nothing_is_left(tmp_path: Path) -> None:
    journal = Journal()
    await journal.keep_pipeline("pipelines/a", KEPT)
    assert list(await journal.pipelines()) == ["pipelines/a"]
    await journal.close()


async def test_an_observer_hears_how_long_callers_waited_and_what_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "BUSY_SECONDS", 0.01)

    class Notes(Observer):
        def __init__(self) -> None:
            self.heard: list[str] = []

        def journal_asked(self) -> None:
            self.heard.append("asked")

        def journal_failed(self) -> None:
            self.heard.append("failed")

        def journal_answered(self, seconds: float) -> None:
            assert seconds > 0
            self.heard.append("answered")

    notes = Notes()
    journal = Journal(tmp_path, observer=notes)
    await journal.keep_pipeline("pipelines/a", KEPT)
    assert notes.heard == ["asked", "answered"]
    # Questions hold nobody up.
    await journal.pipelines()
    with closing(sqlite3.connect(tmp_path / FILE, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(JournalUnavailableError):
            await journal.forget_pipeline("pipelines/a")
    assert notes.heard == ["asked", "answered", "asked", "failed", "answered"]
    await journal.close()
