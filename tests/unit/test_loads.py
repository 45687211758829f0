"""Parts of a load: files are hashed side by side, who is cancelled leaves at once, and phases say when they end."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

import pytest
from denoised_server.messages import LoadProgress
from denoised_server.worker.digests import CHUNK_BYTES, Digests
from denoised_server.worker.load_pace import LoadPace


class Left(BaseException):
    """What a load is cancelled with."""


def never() -> None:
    """Nobody cancels."""


def files(folder: Path, count: int, size: int) -> list[Path]:
    made = [folder / f"model-{index}.safetensors" for index in range(count)]
    for index, path in enumerate(made):
        path.write_bytes(bytes([index]) * size)
    return made


def test_files_are_hashed_side_by_side_with_their_bytes_told(tmp_path: Path) -> None:
    digests, told = Digests(tmp_path / "hub"), list[tuple[int, int]]()
    paths = files(tmp_path, 3, CHUNK_BYTES + 17)
    digests.learn(paths, lambda done, total: told.append((done, total)), never)
    for path in paths:
        assert digests.of_file(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert {total for _, total in told} == {3 * (CHUNK_BYTES + 17)}
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    told.clear()
    digests.learn(paths, lambda done, total: told.append((done, total)), never)
    assert not told


def test_a_file_that_changed_is_hashed_again(tmp_path: Path) -> None:
    digests, (path,) = Digests(tmp_path / "hub"), files(tmp_path, 1, 100)
    digests.learn([path], lambda *_: None, never)
    before = digests.of_file(path)
    path.write_bytes(b"other")
    assert digests.of_file(path) != before


def test_who_leaves_while_files_are_hashed_leaves_no_reader_behind(tmp_path: Path) -> None:
    digests, paths = Digests(tmp_path / "hub"), files(tmp_path, 2, 16 * CHUNK_BYTES)

    def leave() -> None:
        raise Left

    with pytest.raises(Left):
        digests.learn(paths, lambda *_: None, leave)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("digest")]
    assert not digests._known


def test_the_end_of_a_phase_is_told_by_its_pace() -> None:
    pace = LoadPace()
    assert pace.remaining("reading weights", 100, 1100, 0.0) is None
    assert pace.remaining("reading weights", 600, 1100, 5.0) == 5.0
    # Each phase has a pace of its own.
    assert pace.remaining("moving to device", 600, 1100, 6.0) is None
    assert pace.remaining("moving to device", 850, 1100, 7.0) == 1.0
    # Nothing has come, or more than there was to come.
    assert pace.remaining("downloading", 0, 0, 8.0) is None
    assert pace.remaining("downloading", 10, 0, 9.0) is None
    assert LoadProgress("downloading", "", 0, 0).expected_end_time == 0.0
