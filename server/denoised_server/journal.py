"""The journal: what the daemon has promised, on disk, so that the promises outlive its process.

One SQLite file in the state directory, written by one thread in the order in which it is asked. A change that has been
awaited is on the disk; one that could not be made raises, and leaves the file as it was.
"""

from __future__ import annotations

import asyncio
import fcntl
import itertools
import logging
import os
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeAlias, TypeVar

from denoised.errors import JournalUnavailableError

from . import codec
from .observer import Observer

logger = logging.getLogger(__name__)

FILE = "journal.sqlite3"
IN_MEMORY = ":memory:"
LOCK_FILE = "lock"
# How long a change waits for another program that has locked the file, a backup for example.
BUSY_SECONDS = 2.0
RETRY_SECONDS = 1.0
MAX_UNLOADED = 10_000
# Each brings a file of the version that is its place in the list to the next one. Never changed once released.
MIGRATIONS: Sequence[str] = (
    """
    CREATE TABLE pipelines (name TEXT PRIMARY KEY, last_use_time REAL NOT NULL, data TEXT NOT NULL);
    CREATE TABLE unloaded (number INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT UNIQUE NOT NULL);
    """,
    # `request` goes when the generation is over, and `events` come.
    "CREATE TABLE generations (name TEXT PRIMARY KEY, data TEXT NOT NULL, request TEXT, events TEXT);",
)

T = TypeVar("T")
Row: TypeAlias = Mapping[str, Any]


class JournalError(Exception):
    """The journal cannot be opened; the text says what to do."""


@dataclass(frozen=True, slots=True)
class _Job:
    change: Callable[[sqlite3.Connection], Any]
    loop: asyncio.AbstractEventLoop
    done: asyncio.Future[Any]

    def resolve(self, result: object, error: Exception | None) -> None:
        # The loop may have ended by now, with whoever waited.
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self._settle, result, error)

    def _settle(self, result: object, error: Exception | None) -> None:
        if self.done.done():
            return
        if error is None:
            self.done.set_result(result)
        else:
            self.done.set_exception(error)


class Journal:
    """Opened by making one, with the state directory; without one it is kept in memory and forgotten."""

    def __init__(self, state_dir: Path | None = None, *, observer: Observer | None = None) -> None:
        self._observer = observer or Observer()
        self._lock = _lock(state_dir) if state_dir else None
        path = str(state_dir / FILE) if state_dir else IN_MEMORY
        try:
            self._connection = _open(path)
        except (OSError, sqlite3.Error) as error:
            if self._lock is not None:
                self._lock.close()
            raise JournalError(
                f"{path} cannot be used: {error}. Move it away to start without the pipelines that it holds."
            ) from error
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="journal", daemon=True)
        self._thread.start()

    async def close(self) -> None:
        """Returns when everything that was asked for is done."""
        self._jobs.put(None)
        await asyncio.to_thread(self._thread.join)
        self._connection.close()
        if self._lock is not None:
            self._lock.close()

    # Pipelines

    async def pipelines(self) -> dict[str, Row]:
        """What was kept of each pipeline, by its name."""
        return await self._ask(_read_pipelines)

    async def unloaded(self) -> list[str]:
        """Names of pipelines that were forgotten, oldest first."""
        return await self._ask(
            lambda sql: [name for (name,) in sql.execute("SELECT name FROM unloaded ORDER BY number")]
        )

    async def keep_pipeline(self, name: str, kept: Row) -> None:
        def keep(sql: sqlite3.Connection) -> None:
            sql.execute("DELETE FROM unloaded WHERE name = ?", (name,))
            row = name, kept["last_use_time"], codec.encode(kept)
            sql.execute("INSERT OR REPLACE INTO pipelines (name, last_use_time, data) VALUES (?, ?, ?)", row)

        await self._change(keep)

    async def forget_pipeline(self, name: str) -> None:
        def forget(sql: sqlite3.Connection) -> None:
            sql.execute("DELETE FROM pipelines WHERE name = ?", (name,))
            sql.execute("INSERT OR REPLACE INTO unloaded (name) VALUES (?)", (name,))
            sql.execute("DELETE FROM unloaded WHERE number <= (SELECT max(number) FROM unloaded) - ?", (MAX_UNLOADED,))

        await self._change(forget)

    async def note_uses(self, times: Mapping[str, float]) -> None:
        """When pipelines were used last."""
        rows = [(time, name) for name, time in times.items()]
        await self._change(lambda sql: sql.executemany("UPDATE pipelines SET last_use_time = ? WHERE name = ?", rows))

    # Generations

    async def generations(self) -> dict[str, tuple[Row, Row | None]]:
        """What was kept of each, and its request where it is not over, by its name."""
        return await self._ask(_read_generations)

    async def keep_generation(self, name: str, data: Row, request: Row | None) -> None:
        def keep(sql: sqlite3.Connection) -> None:
            row = name, codec.encode(data), codec.encode(request) if request else None
            sql.execute("INSERT OR REPLACE INTO generations (name, data, request) VALUES (?, ?, ?)", row)

        await self._change(keep)

    async def end_generation(self, name: str, data: Row, events: Sequence[object]) -> int:
        """Forgets its request and keeps its events; returns their size in bytes."""

        def end(sql: sqlite3.Connection) -> int:
            text = codec.encode(list(events))
            row = name, codec.encode(data), text
            sql.execute("INSERT OR REPLACE INTO generations (name, data, events) VALUES (?, ?, ?)", row)
            return len(text)

        return await self._change(end)

    async def events(self, name: str) -> list[tuple[int, Any]]:
        """Of a generation that is over; none where it was forgotten."""

        def read(sql: sqlite3.Connection) -> list[tuple[int, Any]]:
            row = sql.execute("SELECT events FROM generations WHERE name = ?", (name,)).fetchone()
            return codec.decode(row[0]) if row and row[0] else []

        return await self._ask(read)

    async def forget_generations(self, names: Sequence[str]) -> None:
        def forget(sql: sqlite3.Connection) -> None:
            sql.executemany("DELETE FROM generations WHERE name = ?", [(name,) for name in names])
            # Gives the room back to the disk.
            sql.execute("PRAGMA incremental_vacuum").fetchall()

        await self._change(forget)

    # How it works

    async def _change(self, change: Callable[[sqlite3.Connection], T]) -> T:
        """Measured, for callers wait until it is on the disk."""
        asked = time.perf_counter()
        self._observer.journal_asked()
        try:
            return await self._ask(change)
        except JournalUnavailableError:
            self._observer.journal_failed()
            raise
        finally:
            self._observer.journal_answered(time.perf_counter() - asked)

    async def _ask(self, change: Callable[[sqlite3.Connection], T]) -> T:
        loop = asyncio.get_running_loop()
        job = _Job(change, loop, loop.create_future())
        self._jobs.put(job)
        result: T = await job.done
        return result

    def _work(self) -> None:
        is_open = True
        while is_open:
            jobs = [self._jobs.get()]
            # All that is waiting shares one write to the disk.
            jobs += [self._jobs.get() for _ in range(self._jobs.qsize())]
            is_open = None not in jobs
            asked = [job for job in jobs if job is not None]
            try:
                results = self._commit(asked)
            except sqlite3.OperationalError as error:
                # Locked, or full: for all of them, and each would have to wait for itself to find out.
                logger.error("the journal cannot be written: %s", error)
                for job in asked:
                    job.resolve(None, _unavailable(error))
            except Exception:
                for job in asked:
                    self._commit_alone(job)
            else:
                for job, result in zip(asked, results, strict=True):
                    job.resolve(result, None)

    def _commit_alone(self, job: _Job) -> None:
        try:
            (result,) = self._commit([job])
        except sqlite3.Error as error:
            logger.error("the journal cannot be written: %s", error)
            job.resolve(None, _unavailable(error))
        except Exception as error:
            job.resolve(None, error)
        else:
            job.resolve(result, None)

    def _commit(self, jobs: Sequence[_Job]) -> list[Any]:
        if not jobs:
            return []
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            results = [job.change(self._connection) for job in jobs]
            self._connection.execute("COMMIT")
        except BaseException:
            # A full disk ends the transaction by itself.
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise
        return results


def _lock(state_dir: Path) -> IO[bytes]:
    """Held for as long as the process lives: two daemons would give each other's pipelines away."""
    try:
        file = (state_dir / LOCK_FILE).open("wb")
    except OSError as error:
        raise JournalError(f"state_dir {state_dir} cannot be written: {error.strerror}.") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise JournalError(
            f"state_dir {state_dir} is in use by another daemon. Give each a state_dir of its own."
        ) from None
    return file


def _open(path: str) -> sqlite3.Connection:
    if path != IN_MEMORY:
        # Made before it is opened, so that nobody else ever reads it: it holds requests and results.
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    connection = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    try:
        # Takes effect in a new file only.
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
        connection.execute("PRAGMA journal_mode = WAL")
        # Each commit is on the disk, not only in the hands of the operating system.
        connection.execute("PRAGMA synchronous = FULL")
        (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        if found != "ok":
            raise sqlite3.DatabaseError(f"it is damaged ({found})")
        _migrate(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def _migrate(connection: sqlite3.Connection) -> None:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > len(MIGRATIONS):
        raise sqlite3.DatabaseError(f"it was written by a newer daemon (its version is {version})")
    for number, script in itertools.islice(enumerate(MIGRATIONS, 1), version, None):
        connection.executescript(f"BEGIN IMMEDIATE; {script} PRAGMA user_version = {number}; COMMIT")


def _read_pipelines(sql: sqlite3.Connection) -> dict[str, Row]:
    found: dict[str, Row] = {}
    with closing(sql.execute("SELECT name, last_use_time, data FROM pipelines")) as rows:
        for name, last_use_time, data in rows:
            try:
                found[name] = {**codec.decode(data), "last_use_time": last_use_time}
            except ValueError as error:
                raise JournalError(f"The journal's entry for {name} cannot be read: {error}.") from error
    return found


def _read_generations(sql: sqlite3.Connection) -> dict[str, tuple[Row, Row | None]]:
    found: dict[str, tuple[Row, Row | None]] = {}
    with closing(sql.execute("SELECT name, data, request FROM generations")) as rows:
        for name, data, request in rows:
            try:
                found[name] = codec.decode(data), codec.decode(request) if request else None
            except ValueError as error:
                raise JournalError(f"The journal's entry for {name} cannot be read: {error}.") from error
    return found


def _unavailable(error: sqlite3.Error) -> JournalUnavailableError:
    text = str(error)
    why = "is locked by another program" if "locked" in text else "cannot be written"
    why = "is on a disk that is full" if "full" in text else why
    return JournalUnavailableError(
        f"The daemon's journal {why}, so nothing that has to last can be promised.",
        hint="Try again shortly; whoever runs the daemon finds the rest in its log.",
        retry_after=RETRY_SECONDS,
    )
