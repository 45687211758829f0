"""Loads: files are hashed side by side and once, who is cancelled leaves at once, and phases say when they end."""

from __future__ import annotations

import gc
import hashlib
import math
import os
import threading
from pathlib import Path

import pytest
from denoised.errors import DamagedWeightsError, LoadTimedOutError
from denoised_server.messages import LoadProgress, Recipe, Spec
from denoised_server.worker import weights
from denoised_server.worker.digest_table import DigestTable, FileState
from denoised_server.worker.digests import CHUNK_BYTES, Digests
from denoised_server.worker.load_deadline import LoadDeadline
from denoised_server.worker.load_pace import LoadPace

from tests import checkpoints
from tests.unit.worker_driver import Driver


class Left(BaseException):
    """What a load is cancelled with."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.stable_diffusion(tmp_path_factory.mktemp("loads"))


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
    for thread in threading.enumerate():
        if thread.name.startswith("digest"):
            thread.join(10)
            assert not thread.is_alive()
    # Nothing that was read in part is taken for known.
    told = list[int]()
    digests.learn(paths, lambda _, total: told.append(total), never)
    assert told[-1] == sum(path.stat().st_size for path in paths)


def test_what_was_hashed_is_known_to_the_next_process_unless_the_file_changed(tmp_path: Path) -> None:
    (path,) = files(tmp_path, 1, 100)
    kept = hashlib.sha256(path.read_bytes()).hexdigest()
    before = DigestTable(str(tmp_path))
    assert Digests(table=before).of_file(path) == kept
    before.close()
    after = DigestTable(str(tmp_path))
    assert after.find(FileState.of(path)) == kept
    # Other bytes of the same length, under the old time of modification.
    old = path.stat()
    path.write_bytes(b"x" * 100)
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))
    assert after.find(FileState.of(path)) is None
    assert Digests(table=after).of_file(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    after.close()


def test_two_workers_share_one_table_and_without_a_directory_nothing_is_kept(tmp_path: Path) -> None:
    (path,) = files(tmp_path, 1, 100)
    state = FileState.of(path)
    one, other, alone = DigestTable(str(tmp_path)), DigestTable(str(tmp_path)), DigestTable()
    one.keep(state, "a")
    other.keep(state, "b")
    assert (one.find(state), alone.find(state)) == ("b", None)
    for table in (one, other, alone):
        table.close()


def test_a_table_of_digests_forgets_what_was_not_asked_for_the_longest(tmp_path: Path) -> None:
    table, states = DigestTable(str(tmp_path), max_files=3), [FileState.of(path) for path in files(tmp_path, 5, 1)]
    for state in states:
        table.keep(state, state.path)
    assert [table.find(state) for state in states] == [None, None, *(state.path for state in states[2:])]
    table.close()


def test_a_damaged_table_of_digests_is_made_anew(tmp_path: Path) -> None:
    (tmp_path / "digests.sqlite3").write_bytes(b"no database" * 1000)
    state = FileState.of(tmp_path)
    table = DigestTable(str(tmp_path))
    table.keep(state, "a")
    table.close()
    again = DigestTable(str(tmp_path))
    assert again.find(state) == "a"
    again.close()


def test_a_table_that_cannot_be_written_costs_no_load(tmp_path: Path) -> None:
    table = DigestTable(str(tmp_path / "nowhere"))
    table.keep(FileState.of(tmp_path), "a")
    assert table.find(FileState.of(tmp_path)) == "a"
    table.close()


def test_a_file_that_changes_while_it_is_hashed_is_refused(tmp_path: Path) -> None:
    digests, (path,) = Digests(), files(tmp_path, 1, 16 * CHUNK_BYTES)

    def append(done: int, total: int) -> None:
        with path.open("ab") as file:
            file.write(b"more")

    with pytest.raises(DamagedWeightsError, match="changes while it is read"):
        digests.learn([path], append, never)


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


def test_a_load_is_given_time_for_its_bytes_and_none_passes_while_it_waits() -> None:
    deadline = LoadDeadline(10, 100)
    deadline.resume(0.0)
    deadline.check(10.0)
    with pytest.raises(LoadTimedOutError, match="longer than the 10 s"):
        deadline.check(10.1)
    deadline.note("downloading", 50, 1000)
    deadline.note("reading weights", 500, 2000)
    deadline.check(40.0)
    deadline.pause(30.0)
    deadline.check(1000.0)
    deadline.resume(1000.0)
    deadline.check(1010.0)
    with pytest.raises(LoadTimedOutError, match="reading weights") as caught:
        deadline.check(1010.1)
    assert caught.value.metadata == {
        "phase": "reading weights",
        "completed_bytes": "500",
        "total_bytes": "2000",
        "allowed_seconds": "40.000",
    }


def test_a_load_that_takes_too_long_ends_and_leaves_nothing_behind(checkpoint: Path) -> None:
    driver = Driver(checkpoint, load_timeout=1e-6, load_bytes_per_second=10**15)
    try:
        with pytest.raises(LoadTimedOutError):
            driver.load("pipelines/a", checkpoint)
        snapshot = driver.snapshot()
        assert (snapshot.components, snapshot.weight_bytes, snapshot.reserved_bytes) == ((), 0, 0)
    finally:
        driver.close()


def test_a_load_that_is_cancelled_at_any_moment_leaves_nothing_behind(checkpoint: Path) -> None:
    """It is asked whether to go on for each tensor, and before and after."""
    driver, recipe = Driver(checkpoint), Recipe(Spec(str(checkpoint), task="text-to-image"))
    asked = [0]

    def load(leave_at: float) -> None:
        asked[0] = 0

        def check() -> None:
            asked[0] += 1
            if asked[0] >= leave_at:
                raise Left

        driver.worker._loader.load("pipelines/a", recipe, lambda _: None, check)

    try:
        for _ in range(2):
            # The second time there is nothing to hash.
            load(math.inf)
            driver.worker._loader.release("pipelines/a")
        times, tensors = asked[0], sum(len(weights.header(file)) for file in checkpoint.rglob("*.safetensors"))
        assert times > tensors
        for leave_at in (1, 2, 3, *range(4, times, times // 7), times):
            with pytest.raises(Left):
                load(leave_at)
            snapshot = driver.snapshot()
            assert (snapshot.components, snapshot.weight_bytes, snapshot.reserved_bytes) == ((), 0, 0), leave_at
            gc.collect()
            assert str(checkpoint) not in Path("/proc/self/maps").read_text(), leave_at
        # Nothing that was left half done is in the way.
        driver.load("pipelines/b", checkpoint)
    finally:
        driver.close()
