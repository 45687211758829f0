"""Previews: maps that are learned from pictures, for latents however they lie; and who gets them."""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import denoised
import numpy as np
import pytest
import torch
from denoised import media, values
from denoised.cli import preview as terminal
from denoised.errors import InvalidFieldError
from denoised.v1 import generation_service_pb2 as pb
from denoised_server import requests
from denoised_server.eventlog import EventLog
from denoised_server.messages import Finished, Generate, Output, Preview, PreviewOptions
from denoised_server.worker import layouts
from denoised_server.worker.previews import Previewer, Previews
from denoised_server.worker.rgb_map import ENOUGH, RgbMap
from PIL import Image
from rich.console import Console
from torch import nn

from tests.unit.worker_driver import Driver

CHANNELS, WIDTH, HEIGHT = 4, 12, 8
MIX = torch.tensor([[0.2, 0.0, 0.1], [0.0, 0.15, -0.1], [-0.1, 0.1, 0.0], [0.05, 0.05, 0.2]])


@dataclass
class Result:
    """As a pipeline of diffusers returns it."""

    images: Any = None
    frames: Any = None


class Decoder(nn.Module):
    """A VAE that says how many channels it has."""

    config = {"latent_channels": CHANNELS}  # noqa: RUF012


class Pipeline:
    """As much of a pipeline as matters here."""

    def __init__(self, decoder: nn.Module) -> None:
        self.vae = decoder


class Scheduler:
    """One that says nothing of where the latents are on the way to."""


def decoded(grid: torch.Tensor) -> Image.Image:
    """The picture of latents (row, column, channel), eight pixels to each."""
    colours = (grid @ MIX + 0.5).clamp(0, 1).mul(255).byte().numpy()
    return Image.fromarray(colours).resize((grid.shape[1] * 8, grid.shape[0] * 8), Image.Resampling.NEAREST)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


class Watched:
    """A request of the pipeline, with what it shows."""

    def __init__(
        self, previews: Previews, decoder: nn.Module, options: PreviewOptions | None, **arguments: Any
    ) -> None:
        self.shown: list[Preview] = []
        pipeline: Any = Pipeline(decoder)
        self.previewer = previews.of(pipeline, arguments, options, self.shown.append)

    def step(self, latents: torch.Tensor, completed: int, total: int = 10) -> None:
        assert isinstance(self.previewer, Previewer)
        self.previewer.stepped(Scheduler(), None, (latents,), completed, total)

    def end(self, result: Result) -> None:
        assert isinstance(self.previewer, Previewer)
        self.previewer.fit(result)


def packed(grid: torch.Tensor) -> torch.Tensor:
    return grid.flatten(0, 1)


LAYOUTS: dict[str, Any] = {
    "planes": lambda grids: torch.stack([grid.permute(2, 0, 1) for grid in grids])[:1],
    "rows": lambda grids: packed(grids[0])[None],
    "video, channels first": lambda grids: torch.stack([grid.permute(2, 0, 1) for grid in grids], dim=1)[None],
    "video, frames first": lambda grids: torch.stack([grid.permute(2, 0, 1) for grid in grids])[None],
    "video in rows": lambda grids: torch.cat([packed(grid) for grid in grids])[None],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_latents_become_the_colours_of_their_pictures_however_they_lie(layout: str, pool: ThreadPoolExecutor) -> None:
    previews, decoder, rng = Previews(pool), Decoder(), torch.Generator().manual_seed(0)
    frames = 3 if "video" in layout else 1
    for number in range(3):
        grids = [torch.randn(HEIGHT, WIDTH, CHANNELS, generator=rng) for _ in range(frames)]
        watched = Watched(previews, decoder, PreviewOptions(1, WIDTH))
        watched.step(LAYOUTS[layout](grids), 9)
        pool.submit(lambda: None).result()
        if number:
            (preview,) = watched.shown
            image = media.unpack(preview.artifact)
            expected = decoded(grids[0]).resize((WIDTH, HEIGHT), Image.Resampling.BOX)
            assert image.size == (WIDTH, HEIGHT)
            # JPEG is coarse where every pixel is another, and the map linear where colours come to their ends.
            shown, right = np.asarray(image.convert("L"), float), np.asarray(expected.convert("L"), float)
            assert np.corrcoef(shown.ravel(), right.ravel())[0, 1] > 0.95
            assert abs(shown.mean() - right.mean()) < 6
        else:
            assert watched.shown == []
        pictures = [decoded(grid) for grid in grids]
        # Causal VAEs have more frames than latents.
        watched.end(Result(frames=[[pictures[0], *pictures]]) if frames > 1 else Result(images=pictures))


def test_a_map_is_found_exactly_and_needs_no_more_after_a_few_pictures() -> None:
    known, rng = RgbMap(CHANNELS), torch.Generator().manual_seed(0)
    for _ in range(ENOUGH):
        assert not known.is_settled
        latents = torch.randn(64, CHANNELS, generator=rng)
        known.fit(latents, latents @ MIX + 0.5)
    assert known.is_settled
    latents = torch.randn(5, 7, CHANNELS, generator=rng) / 2
    expected = (latents @ MIX + 0.5).clamp(0, 1) * 255
    assert (known.colours(latents).float() - expected).abs().max() <= 1


def test_one_picture_of_one_colour_is_no_reason_to_show_others_wildly() -> None:
    known = RgbMap(CHANNELS)
    known.fit(torch.full((64, CHANNELS), 0.3), torch.tensor([[0.9, 0.1, 0.1]]).expand(64, 3))
    colours = known.colours(torch.full((1, CHANNELS), 0.3)).tolist()
    assert colours == [[230, 26, 26]] or colours == [[229, 25, 25]]
    assert known.colours(torch.zeros(1, CHANNELS))[0, 0] > 150


def test_numbers_that_are_none_are_not_learned() -> None:
    known = RgbMap(1)
    known.fit(torch.full((4, 1), torch.nan), torch.ones(4, 3))
    assert not known.is_ready


def test_who_wants_none_has_none_and_nothing_is_done_once_the_map_is_known(pool: ThreadPoolExecutor) -> None:
    previews, decoder = Previews(pool), Decoder()
    for _ in range(ENOUGH):
        watched, grid = Watched(previews, decoder, None), torch.randn(HEIGHT, WIDTH, CHANNELS)
        watched.step(LAYOUTS["planes"]([grid]), 9)
        watched.end(Result([decoded(grid)]))
        assert watched.shown == []
    assert Watched(previews, decoder, None).previewer is None
    assert Watched(previews, decoder, PreviewOptions(1, 64)).previewer is not None
    assert Watched(previews, Decoder(), None).previewer is not None


def test_a_preview_is_left_out_while_the_one_before_is_on_its_way(pool: ThreadPoolExecutor) -> None:
    previews, decoder, grid = Previews(pool), Decoder(), torch.randn(HEIGHT, WIDTH, CHANNELS)
    first = Watched(previews, decoder, None)
    first.step(LAYOUTS["planes"]([grid]), 9)
    first.end(Result([decoded(grid)]))
    watched, gate = Watched(previews, decoder, PreviewOptions(2, 64)), threading.Event()
    pool.submit(gate.wait)
    for completed in range(1, 7):
        watched.step(LAYOUTS["planes"]([grid]), completed)
    gate.set()
    pool.submit(lambda: None).result()
    assert [preview.completed_steps for preview in watched.shown] == [2]
    watched.step(LAYOUTS["planes"]([grid]), 8)
    watched.step(LAYOUTS["planes"]([grid]), 10)
    pool.submit(lambda: None).result()
    assert [preview.completed_steps for preview in watched.shown] == [2, 8]


@pytest.mark.parametrize(
    ("tokens", "size", "frames", "rows"),
    [(64, (64, 64), 1, [8]), (96, (96, 64), 1, [8]), (60, (64, 64), 1, []), (16, (64, 64), 4, [4, 2])],
)
def test_rows_that_packed_latents_may_have(tokens: int, size: tuple[int, int], frames: int, rows: list[int]) -> None:
    assert list(layouts.packed_rows(tokens, size, frames=frames)) == rows


# A real worker


def test_a_request_that_asks_sees_what_it_is_making(checkpoint_dir: Path, sd_checkpoint: Path, tmp_path: Path) -> None:
    driver = Driver(checkpoint_dir, tmp_path)
    arguments: dict[str, Any] = {"prompt": "a cat", "height": 64, "width": 96, "num_inference_steps": 6}
    command = Generate("pipelines/a", arguments, seeds=(1,), preview=PreviewOptions(2, 48))
    try:
        driver.load("pipelines/a", sd_checkpoint)
        first, second = driver.start(command).result(), None
        for _ in range(100):
            second = driver.start(command).result()
            if any(isinstance(event, Preview) for event in second):
                break
    finally:
        driver.close()
    assert second is not None
    previews = [event for event in second if isinstance(event, Preview)]
    assert {preview.completed_steps for preview in previews} <= {2, 4}
    assert media.unpack(previews[0].artifact).size == (48, 32)
    assert [type(second[-2]), type(second[-1])] == [Output, Finished]
    plain = [event.artifact for event in first if isinstance(event, Output)]
    assert [event.artifact for event in second if isinstance(event, Output)] == plain


# On the way to callers


async def test_a_slow_reader_gets_every_event_and_only_the_latest_preview() -> None:
    log = EventLog[str]()
    read: list[str] = []

    async def follow(pause: asyncio.Event) -> None:
        async with aclosing(log.read()) as entries:
            async for entry in entries:
                read.append(entry.event)
                await pause.wait()

    pause = asyncio.Event()
    task = asyncio.create_task(follow(pause))
    log.put("started")
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    for number in range(5):
        log.show(0, f"preview {number}")
        log.show(1, f"other {number}")
        log.put(f"step {number}")
    pause.set()
    await asyncio.sleep(0.01)
    assert read == ["started", *(f"step {number}" for number in range(5)), "preview 4", "other 4"]
    log.show(0, "preview 5")
    log.put("output")
    log.end()
    await task
    assert read[-2:] == ["other 4", "output"]
    assert [entry.event for entry in log.entries][-1] == "output"
    assert "preview 4" not in [entry.event for entry in log.entries]


@pytest.mark.parametrize(("interval", "size"), [(0, 64), (1001, 64), (1, 15), (1, 1025), (-1, 64)])
def test_previews_out_of_bounds_are_refused(interval: int, size: int) -> None:
    request = pb.GenerateRequest(preview=pb.PreviewOptions(step_interval=interval, size=size))
    with pytest.raises(InvalidFieldError, match="preview"):
        requests.generate(request)
    assert requests.generate(pb.GenerateRequest(preview=pb.PreviewOptions(step_interval=3))).preview == PreviewOptions(
        3, 256
    )


# In a terminal


def preview(size: tuple[int, int] = (4, 4)) -> denoised.Preview:
    artifact = values.artifact_to_proto(media.pack_image(Image.new("RGB", size, (200, 20, 20))))
    return denoised.Preview.of(pb.Preview(index=0, completed_steps=2, total_steps=9, artifact=artifact))


def test_a_terminal_shows_two_pixels_for_each_character() -> None:
    lines = terminal.picture(preview((4, 6))).plain.splitlines()
    assert lines == ["▀▀▀▀"] * 3


def test_a_terminal_that_can_is_drawn_on_and_others_are_left_alone() -> None:
    page = io.StringIO()
    with terminal.live(Console(file=page, force_terminal=True, color_system="truecolor", width=80)) as show:
        assert show is not None
        show(preview())
    assert "38;2;200;20;20" in page.getvalue()
    assert "step 2 of 9" in page.getvalue()
    for console in (Console(file=io.StringIO()), Console(force_terminal=True, color_system="standard")):
        with terminal.live(console) as show:
            assert show is None
