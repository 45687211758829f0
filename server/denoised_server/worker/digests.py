"""What identifies components: digests of the content of their files."""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

from denoised.errors import DamagedWeightsError

from .digest_table import DigestTable, FileState

CHUNK_BYTES = 4 << 20
# Files that are read at a time; a disk is kept busy by more than one.
THREADS = min(8, max(2, os.cpu_count() or 2))
# How often whoever waits is asked whether it still does. Seconds.
CHECK_SECONDS = 0.05


class Digests:
    """Content digests of files, each computed once for as long as the file stays as it is."""

    def __init__(self, *hub_caches: Path, table: DigestTable | None = None) -> None:
        self._hub_caches = hub_caches
        self._table = table or DigestTable()

    def with_cache(self, hub_cache: Path) -> Digests:
        """The same memory, where files of another cache of the Hub's are believed too."""
        return Digests(*self._hub_caches, hub_cache, table=self._table)

    def of_file(self, path: Path) -> str:
        """SHA-256, hexadecimal. The Hub's cache names blobs by it, so those are not read; other names prove nothing.

        Raises DamagedWeightsError for a file that changes while it is read.
        """
        if (name := self._blob(path)) is not None:
            return name
        state = FileState.of(path)
        return self._table.find(state) or self._read(state, lambda _: None)

    def is_known(self, path: Path) -> bool:
        """Whether a file is as it was when its digest was asked for."""
        try:
            return self._blob(path) is not None or self._table.find(FileState.of(path)) is not None
        except OSError:
            return False

    def close(self) -> None:
        self._table.close()

    def learn(
        self, paths: Iterable[Path], progress: Callable[[int, int], None], check_cancelled: Callable[[], None]
    ) -> None:
        """Computes the digests of these files that are not known, several at a time.

        `progress` is told the bytes that were read, and all. Raises what `check_cancelled` raises, at once; readers end
        with the pieces that they are at.
        """
        unhashed = {FileState.of(path) for path in paths if self._blob(path) is None}
        unknown = [state for state in unhashed if self._table.find(state) is None]
        if not unknown:
            return
        done, total, is_left = [0], sum(state.size for state in unknown), threading.Event()

        def came(size: int) -> None:
            done[0] += size
            if is_left.is_set():
                raise _LeftError

        readers = ThreadPoolExecutor(THREADS, "digest")
        running: set[Future[str]] = {readers.submit(self._read, state, came) for state in unknown}
        try:
            while running:
                check_cancelled()
                progress(done[0], total)
                finished, running = wait(running, CHECK_SECONDS, FIRST_COMPLETED)
                for each in finished:
                    each.result()
        finally:
            # Who leaves does not wait for a disk that does not answer: readers end with the piece that they are at.
            is_left.set()
            readers.shutdown(wait=False, cancel_futures=True)

    def of_component(self, files: Iterable[Path], *, config: Path, class_name: str, dtype: str, role: str = "") -> str:
        """Identity of a component: the same for the same weights, class, configuration and element type.

        `role` says which of several components in the same files it is.
        """
        identity = hashlib.sha256()
        for part in (class_name, dtype, _configuration(config), *([role] if role else [])):
            identity.update(f"{part}\n".encode())
        for path in sorted(files, key=lambda path: path.name):
            # Without the variant: the same bytes are the same weights under any name.
            identity.update(f"{self.of_file(path)}\n".encode())
        return f"sha256:{identity.hexdigest()}"

    def _blob(self, path: Path) -> str | None:
        real = path.resolve()
        is_blob = real.parent.name == "blobs" and any(real.is_relative_to(cache) for cache in self._hub_caches)
        return real.name if is_blob and re.fullmatch(r"[0-9a-f]{64}", real.name) else None

    def _read(self, state: FileState, came: Callable[[int], None]) -> str:
        digest, buffer, path = hashlib.sha256(), bytearray(CHUNK_BYTES), Path(state.path)
        view = memoryview(buffer)
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                digest.update(view[:count])
                came(count)
        if FileState.of(path) != state:
            raise DamagedWeightsError(
                f"The weight file {path.parent.name}/{path.name} changes while it is read.",
                hint="Load it when it has been written to its end.",
            )
        self._table.keep(state, digest.hexdigest())
        return digest.hexdigest()


class _LeftError(Exception):
    """Ends reading that nobody waits for any more."""


def _configuration(path: Path) -> str:
    """What decides the module, in one spelling; who saved it with which version, and from where, does not."""
    if not path.is_file():
        return ""
    config = json.loads(path.read_text())
    dropped = {"transformers_version", "torch_dtype", "dtype"}
    return json.dumps({k: v for k, v in config.items() if not k.startswith("_") and k not in dropped}, sort_keys=True)
