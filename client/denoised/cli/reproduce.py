"""`denoised reproduce`."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image

from .. import manifest, reproduction
from ..client import Client
from ..errors import DenoisedError, InternalError
from ..manifest import Embedded, Manifest
from ..result import assemble
from ..v1 import generation_service_pb2 as pb
from .console import print_json
from .generate import open_image
from .options import DefaultTarget, Json, Target, Token, connect

# Exit code for a picture that came out different.
DIFFERENT = 3


def reproduce(
    picture: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A picture with a manifest.")],
    image: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="The image that it was made from.")
    ] = None,
    mask: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="The mask that it was made with.")
    ] = None,
    media: Annotated[
        list[str] | None,
        typer.Option(help="Any other image among its arguments. Repeatable.", metavar="NAME=FILE"),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Where to keep what was made now.")] = None,
    json: Json = False,
    target: Target = DefaultTarget,
    token: Token = None,
) -> None:
    """Make a picture again from the manifest in it, and compare.

    Loads the same pipeline, with the same adapters, and runs the same call alone. Exit code 0 says that the pixels are
    the same, or differ by rounding where calls of the first run were joined with others; 3 that they differ.

    [bold]Examples[/bold]
    [cyan]denoised generate apples -p "a red apple" --embed-manifest -o apple.png[/cyan]
    [cyan]denoised reproduce apple.png[/cyan]
    [cyan]denoised reproduce tangerine.png --image apple.png[/cyan]
    """
    found = open_image(picture)
    embedded = manifest.read(found)
    given = {"image": image, "mask_image": mask} | dict(_assignment(item) for item in media or ())
    images = {name: open_image(path) for name, path in given.items() if path is not None}
    with connect(target, token) as client:
        again, now = _make(client, embedded, images)
    comparison = reproduction.compare(found, embedded, again, now)
    if output is not None:
        again.save(output)
    if json:
        print_json(
            {
                "identical": comparison.is_identical,
                "within_rounding": comparison.is_within_rounding,
                "joined": embedded.manifest.joined,
                "difference": comparison.difference,
                "differences": comparison.differences,
            }
        )
    else:
        _tell(picture, embedded, comparison)
    if not comparison.is_within_rounding:
        raise typer.Exit(DIFFERENT)


def _assignment(item: str) -> tuple[str, Path]:
    name, equals, path = item.partition("=")
    if not equals or not Path(path).is_file():
        raise typer.BadParameter(f"{item!r} is not of the form NAME=FILE.", param_hint="--media")
    return name, Path(path)


def _make(client: Client, embedded: Embedded, images: dict[str, Image.Image]) -> tuple[Image.Image, Manifest]:
    pipe = client.restore(embedded.manifest)
    try:
        request = reproduction.request(embedded.manifest, pipe.info, images)
        outputs: list[pb.Output] = []
        summary: pb.Summary | None = None
        for event in client.generate(request):
            if event.HasField("output"):
                outputs.append(event.output)
            elif event.HasField("summary"):
                summary = event.summary
        if summary is None:
            raise InternalError("The daemon ended the generation without a summary.")
        result = assemble(outputs, summary, is_pil=True)
        return result.images[embedded.index], result.manifest
    finally:
        with contextlib.suppress(DenoisedError):
            pipe.unload()


def _tell(picture: Path, embedded: Embedded, comparison: reproduction.Comparison) -> None:
    if comparison.is_identical:
        typer.echo(f"{picture}: reproduced, bit for bit.")
    elif comparison.is_within_rounding:
        typer.echo(
            f"{picture}: reproduced within rounding ({comparison.difference} of 255 at most). Calls of the first run "
            "were joined with those of others."
        )
    else:
        how = "another size" if comparison.difference is None else f"up to {comparison.difference} of 255"
        joined = " Calls of the first run were joined with those of others." if embedded.manifest.joined else ""
        typer.echo(f"{picture}: different ({how}).{joined}")
    for line in comparison.differences:
        typer.echo(f"  {line}")
