"""Digests of files, kept over restarts: a worker that comes up again reads no file a second time to know what it is."""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from dataclasses import astuple, dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

FILE = "digests.sqlite3"
IN_MEMORY = ":memory:"
# Files that are remembered; those that were not asked for the longest go first.
MAX_FILES = 20_000
# Workers of one daemon share the table and wait for each other. Seconds.
BUSY_SECONDS = 2.0
# How exact the time of the last use is. Seconds.
USE_SECONDS = 3600.0

_COLUMNS = "path, size, modified, changed, inode"
_SCHEMA = (
    f"CREATE TABLE IF NOT EXISTS digests ({_COLUMNS}, digest TEXT NOT NULL, used REAL NOT NULL, PRIMARY KEY (path))"
    " WITHOUT ROWID"
)


@dataclass(frozen=True, slots=True)
class FileState:
    """What a file is told by while its content is the same; times in nanoseconds.

    The modification time alone proves little, since programs set it. The time of the last change is the system's.
    """

    path: str
    size: int
    modified: int
    changed: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> FileState:
        real = path.resolve()
        state = real.stat()
        return cls(str(real), state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino)


class DigestTable:
    """In a directory, where other processes may have it open too; without one, in memory.

    A table that cannot be used costs time and no load: it is made anew, or kept in memory.
    """

    def __init__(self, state_dir: str = "", *, max_files: int = MAX_FILES) -> None:
        self._max_files, self._lock = max_files, threading.Lock()
        self._connection = _open(Path(state_dir, FILE)) if state_dir else _connect(IN_MEMORY)

    def find(self, state: FileState) -> str | None:
        """The digest of a file that is as it was; None when that is not known."""
        now = time.time()
        try:
            with self._lock:
                row = self._connection.execute(
                    f"SELECT digest, used FROM digests WHERE ({_COLUMNS}) = (?, ?, ?, ?, ?)", astuple(state)
                ).fetchone()
                if row is not None and now - row[1] > USE_SECONDS:
                    self._connection.execute("UPDATE digests SET used = ? WHERE path = ?", (now, state.path))
        except sqlite3.Error as error:
            self._lose(error)
            return None
        return None if row is None else str(row[0])

    def keep(self, state: FileState, digest: str) -> None:
        """Remembers it in place of what was known of a file at this path."""
        row = (*astuple(state), digest, time.time())
        try:
            with self._lock:
                self._connection.execute("INSERT OR REPLACE INTO digests VALUES (?, ?, ?, ?, ?, ?, ?)", row)
                self._connection.execute(
                    "DELETE FROM digests WHERE path IN (SELECT path FROM digests ORDER BY used DESC LIMIT -1 OFFSET ?)",
                    (self._max_files,),
                )
        except sqlite3.Error as error:
            self._lose(error)

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def _lose(self, error: sqlite3.Error) -> None:
        """Goes on in memory: a full disk must not cost each load the wait for it."""
        logger.warning("digests of weight files are kept in memory from now on: %s", error)
        with self._lock:
            self._connection.close()
            self._connection = _connect(IN_MEMORY)


def _open(path: Path) -> sqlite3.Connection:
    for is_again in (False, True):
        try:
            return _connect(str(path))
        except sqlite3.DatabaseError as error:
            # Locked or unwritable is not damaged.
            if is_again or isinstance(error, sqlite3.OperationalError):
                logger.warning("digests of weight files are kept in memory: %s", error)
                break
            logger.warning("the table of digests is damaged and made anew: %s", error)
            try:
                for name in (path.name, f"{path.name}-wal", f"{path.name}-shm"):
                    path.with_name(name).unlink(missing_ok=True)
            except OSError as trouble:
                logger.warning("the table of digests cannot be made anew: %s", trouble)
                break
    return _connect(IN_MEMORY)


def _connect(path: str) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    try:
        # What a crash of the machine takes is read again.
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute(_SCHEMA)
        connection.execute("SELECT count(*) FROM digests").fetchone()
    except sqlite3.Error:
        connection.close()
        raise
    return connection
