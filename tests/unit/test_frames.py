from __future__ import annotations

import asyncio
import socket
import threading
from typing import Any

from denoised_server.executor.frames import Frames, pack, receive
from hypothesis import given, settings
from hypothesis import strategies as st

SIZES = (0, 1, 100, 65_000, 65_536, 200_000)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(), st.sampled_from(SIZES)), max_size=8),
    st.lists(st.integers(1, 100_000), min_size=1, max_size=5),
)
def test_messages_arrive_whole_however_the_stream_is_cut(messages: list[tuple[int, int]], cuts: list[int]) -> None:
    sent = [(number, b"x" * size) for number, size in messages]
    stream = b"".join(b"".join(pack(message)) for message in sent)
    received: list[Any] = []
    frames = Frames(received.append, lambda: None)
    turn = 0
    while stream:
        room = frames.get_buffer(-1)
        count = min(cuts[turn % len(cuts)], len(room), len(stream))
        room[:count] = stream[:count]
        del room
        stream, turn = stream[count:], turn + 1
        frames.buffer_updated(count)
    assert received == sent


async def test_both_ends_understand_each_other() -> None:
    ours, theirs = socket.socketpair()
    received: list[Any] = []
    lost = asyncio.Event()

    def echo() -> None:
        with theirs:
            for message in receive(theirs):
                theirs.sendall(b"".join(pack(message)))

    thread = threading.Thread(target=echo)
    thread.start()
    transport, _ = await asyncio.get_running_loop().create_connection(
        lambda: Frames(received.append, lost.set), sock=ours
    )
    sent = [("small", 1), ("large", b"y" * 3_000_000), ("last", None)]
    for message in sent:
        transport.writelines(pack(message))
    transport.write_eof()
    await lost.wait()
    thread.join()
    assert received == sent


def test_a_stream_that_ends_within_a_message_ends_quietly() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        with ours:
            ours.sendall(b"".join(pack("whole")) + b"".join(pack("cut off"))[:-1])
        assert list(receive(theirs)) == ["whole"]
