"""`denoised generate`."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from PIL import Image, ImageOps
from rich.console import Console

from ..errors import DenoisedError
from ..result import PipelineOutput
from ..values import Artifact
from .console import print_json, to_json
from .options import (
    DefaultTarget,
    Json,
    Target,
    Token,
    check_writable,
    connect,
    fail,
    parse_adapters,
    parse_assignments,
)
from .preview import SIZE, live

# Endings of files that the daemon writes.
MEDIA_TYPES = {".wav": "audio/wav", ".mp4": "video/mp4"}


class Batching(enum.StrEnum):
    """As `denoised.v1.Batching`."""

    ALLOW = "allow"
    FORBID = "forbid"


def generate(
    name: Annotated[str, typer.Argument(help="The pipeline to run: its handle, or the id alone.")],
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="What to make.", rich_help_panel="Input")] = None,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="Where to write the image, the sound (.wav) or the video (.mp4); the ending chooses the format, - is "
            "stdout. Several images become image-0.png, image-1.png, …",
        ),
    ] = Path("image.png"),
    negative_prompt: Annotated[
        str | None, typer.Option(help="What to steer away from.", rich_help_panel="Input")
    ] = None,
    image: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Image to start from, for image-to-image and inpainting.",
            rich_help_panel="Input",
        ),
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Where to paint, for inpainting: white is painted, black is kept.",
            rich_help_panel="Input",
        ),
    ] = None,
    video: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="Video to start from, for video-to-video.", rich_help_panel="Input"
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.", rich_help_panel="Sampling")] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="Strength of classifier-free guidance.", rich_help_panel="Sampling")
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(help="How far to move away from the image, from 0 to 1.", rich_help_panel="Sampling"),
    ] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.", rich_help_panel="Sampling")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.", rich_help_panel="Sampling")] = None,
    fps: Annotated[
        float | None, typer.Option(help="Frames that a second of an .mp4 has.", rich_help_panel="Sampling")
    ] = None,
    num_images: Annotated[
        int | None, typer.Option(help="Images to make in one go.", rich_help_panel="Sampling")
    ] = None,
    seed: Annotated[
        list[int] | None,
        typer.Option(
            help="Makes the result repeatable. Once, or once per image. Printed when it is left out.",
            rich_help_panel="Sampling",
        ),
    ] = None,
    arg: Annotated[
        list[str] | None,
        typer.Option(
            help="Any other argument of the pipeline's __call__, as JSON or text. Repeatable.",
            metavar="NAME=JSON",
            rich_help_panel="Sampling",
        ),
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            help="A LoRA for this run alone, and how strong it is: a repository, a directory or a loaded one's name; "
            "a file of it as REPO/FILE.safetensors. Repeatable.",
            metavar="REPO[:SCALE]",
            rich_help_panel="Sampling",
        ),
    ] = None,
    batching: Annotated[
        Batching,
        typer.Option(help="forbid gives the bits that diffusers gives alone.", rich_help_panel="Running"),
    ] = Batching.ALLOW,
    priority: Annotated[
        int, typer.Option(min=-100, max=100, help="Higher runs earlier.", rich_help_panel="Running")
    ] = 0,
    embed_manifest: Annotated[
        bool,
        typer.Option(
            "--embed-manifest",
            help="Write into PNG, JPEG and WebP how they were made, for denoised reproduce.",
            rich_help_panel="Running",
        ),
    ] = False,
    preview: Annotated[
        bool,
        typer.Option(
            "--preview",
            help="Show what is being made, in terminals that have the colours for it.",
            rich_help_panel="Running",
        ),
    ] = False,
    timeout: Annotated[
        float | None, typer.Option(help="Seconds it may take, waiting included.", rich_help_panel="Running")
    ] = None,
    detach: Annotated[
        bool,
        typer.Option(
            "--detach",
            help="Print the generation's name and leave; it goes on in the daemon. `denoised result NAME` fetches it.",
            rich_help_panel="Running",
        ),
    ] = False,
    json: Json = False,
    target: Target = DefaultTarget,
    token: Token = None,
) -> None:
    """Run a pipeline and write what it makes.

    What is left out keeps the pipeline's own default.
    Ctrl-C stops the generation in the daemon too.

    [bold]Examples[/bold]
    [cyan]denoised generate apples -p "a red apple" -o apple.png --steps 20 --seed 7[/cyan]
    [cyan]denoised generate apples-i2i -p "a tangerine" --image apple.png --strength 0.6[/cyan]
    [cyan]denoised generate apples-inpaint -p "a leaf" --image apple.png --mask stalk.png[/cyan]
    [cyan]denoised generate rain -p "rain on a tin roof" -o rain.wav[/cyan]
    [cyan]denoised generate boat -p "a boat in a storm" -o boat.mp4 --fps 24[/cyan]
    [cyan]denoised generate xl -p "a harbour" --arg guidance_rescale=0.7 --arg prompt_2='"oil on canvas"'[/cyan]
    """
    arguments: dict[str, Any] = {
        "prompt": prompt,
        "negative_prompt": negative_prompt,
        "image": image and open_image(image),
        "mask_image": mask and open_image(mask),
        "video": video and Artifact("video/mp4", video.read_bytes()),
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
        "strength": strength,
        "width": width,
        "height": height,
        "num_images_per_prompt": num_images,
    }
    # What was not said is not sent: diffusers takes None for a value.
    arguments = {name: value for name, value in arguments.items() if value is not None}
    arguments |= parse_assignments(arg, "--arg")
    seeds = seed[0] if seed and len(seed) == 1 else seed or None
    check_output(output, json=json)
    with connect(target, token) as client:
        pipe = client.pipeline(name)
        pipe.set_progress_bar_config(disable=None)
        arguments |= {
            "batching": batching.value,
            "priority": priority,
            "seed": seeds,
            "adapters": parse_adapters(lora),
            "media_type": MEDIA_TYPES.get(output.suffix.lower(), ""),
            "frames_per_second": fps,
        }
        if detach:
            job = pipe.submit(timeout=timeout, **arguments)
            if json:
                print_json(to_json(job.info))
            else:
                typer.echo(job.name)
            return
        with live(Console(stderr=True)) if preview else contextlib.nullcontext() as show:
            if show is not None:
                # Both would write over each other.
                pipe.set_progress_bar_config(disable=True)
                arguments |= {"on_preview": show, "preview_size": SIZE}
            result = pipe(timeout=timeout, embed_manifest=embed_manifest, **arguments)
    deliver(result, output, json=json)


def deliver(result: PipelineOutput, output: Path, *, json: bool) -> None:
    """Writes what was made, and says so."""
    written = _write(result, output)
    if json:
        print_json(
            {_field(result): written, "seeds": list(result.seeds), "timings": dataclasses.asdict(result.timings)}
            | {name: result[name] for name in result if name != _field(result)}
        )
    elif str(output) != "-":
        _tell(result, written)


def open_image(path: Path) -> Image.Image:
    """Raises DenoisedError for what is none."""
    try:
        # As diffusers' load_image does.
        picture = ImageOps.exif_transpose(Image.open(path))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise DenoisedError(f"{path} is not an image that can be read.", hint="Give a PNG, JPEG or WebP.") from error
    return picture


def check_output(output: Path, *, json: bool) -> None:
    """Raises typer.BadParameter before work is done whose result could not be kept."""
    if json and str(output) == "-":
        raise typer.BadParameter("stdout cannot take both the image and --json.", param_hint="--output")
    if str(output) == "-":
        return
    check_writable(output)
    # Pillow reads more formats than it writes.
    if (
        output.suffix.lower() not in MEDIA_TYPES
        and Image.registered_extensions().get(output.suffix.lower()) not in Image.SAVE
    ):
        raise typer.BadParameter(f"{output.name} names no image format.", param_hint="--output")


def _field(result: PipelineOutput) -> str:
    """What is written of it."""
    return next((name for name in ("images", "frames", "audios") if name in result), "")


def _write(result: PipelineOutput, output: Path) -> list[str]:
    made = result[_field(result)] if _field(result) else None
    if not isinstance(made, list) or not all(isinstance(item, Image.Image | Artifact) for item in made):
        fail(
            "What the pipeline returned cannot be written to this file.",
            "Sounds are written to .wav, videos to .mp4; for images leave out --arg output_type.",
        )
    if str(output) == "-":
        made[0].save(sys.stdout.buffer, "PNG")
        return ["-"]
    paths = [output.with_stem(f"{output.stem}-{index}") for index in range(len(made))]
    paths = [output] if len(made) == 1 else paths
    for item, path in zip(made, paths, strict=True):
        item.save(path)
    return [str(path) for path in paths]


def _tell(result: PipelineOutput, written: list[str]) -> None:
    seeds = ", ".join(map(str, result.seeds))
    timings = result.timings
    typer.echo(
        f"{' '.join(written)}  (seed {seeds}; {timings.run_seconds:.2f} s, {timings.queue_seconds:.2f} s queued)"
    )
