"""Memory of the host that is let go of, and whether the system has it back."""

from __future__ import annotations

import psutil
import pytest
import torch
from denoised_server.worker import mapped
from denoised_server.worker.host_memory import Rest

from tests.memory_limit import MIB, limited


def resident() -> int:
    return int(psutil.Process().memory_info().rss)


def test_a_buffer_is_back_with_the_system_when_the_last_of_its_tensors_is_gone() -> None:
    before, start = mapped.size_bytes(), resident()
    buffer = mapped.empty(64 * MIB)
    buffer.fill_(1)
    part = buffer[: 4 * MIB].view(torch.float32)
    del buffer
    assert mapped.size_bytes() - before == 64 * MIB
    assert resident() - start > 60 * MIB
    del part
    assert mapped.size_bytes() == before
    assert resident() - start < 4 * MIB


def test_an_empty_buffer_takes_nothing() -> None:
    before = mapped.size_bytes()
    buffer = mapped.empty(0)
    assert (buffer.numel(), mapped.size_bytes()) == (0, before)


def test_a_buffer_that_there_is_no_memory_for_is_said_to_be_so() -> None:
    before = mapped.size_bytes()
    with limited(16 * MIB), pytest.raises(MemoryError, match="tried to allocate 67108864 bytes"):
        mapped.empty(64 * MIB)
    assert mapped.size_bytes() == before


def test_memory_is_given_back_once_after_each_stretch_of_work_that_is_over() -> None:
    rest = Rest(5.0)
    works = {10: True, 14: False, 15: True, 19: False, 20: False, 30: False, 31: True, 40: False}
    looks = {0: False, 9: False, **works}
    assert [now for now, is_busy in looks.items() if rest.look(is_idle=not is_busy, now=now)] == [20, 40]
