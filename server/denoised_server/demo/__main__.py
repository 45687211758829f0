"""The whole story in one run: a daemon, the demo model, pictures of three tasks, tables of what is held, and an end.

python -m denoised_server.demo --out out        # what `make demo` does
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from denoised import AutoPipelineForImage2Image, AutoPipelineForInpainting, AutoPipelineForText2Image, Client
from PIL import Image, ImageDraw

PROMPTS = (
    "red apple",
    "hamburger",
    "slice of pizza",
    "strawberry",
    "sunflower",
    "maple leaf",
    "panda face",
    "octopus",
    "butterfly",
    "lady beetle",
    "rocket",
    "fire engine",
    "castle",
    "rainbow",
    "crown",
    "guitar",
)
# A picture that was made first, and what to make of it.
IMAGE_TO_IMAGE = (("red apple", "tangerine"), ("panda face", "bear face"))
INPAINTING = (("panda face", "tiger face"), ("castle", "rocket"))
METRICS = ("denoised_images_total", "denoised_batch_size_count", "denoised_batch_size_sum", "denoised_component_bytes")
STEPS, GUIDANCE, MARGIN = 20, 4.0, 8


@contextmanager
def daemon(log: Path) -> Iterator[tuple[str, str]]:
    """A daemon of its own on free ports; yields its target and the address of its metrics."""
    with tempfile.TemporaryDirectory() as state, log.open("w") as stderr:
        command = [sys.executable, "-m", "denoised", "serve", "--state-dir", state]
        command += ["--address", "127.0.0.1:0", "--metrics-address", "127.0.0.1:0"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)
        try:
            line = process.stdout.readline() if process.stdout else ""
            found = re.search(r"ready on (\S+), metrics on (\S+)", line)
            if found is None:
                sys.exit(f"the daemon did not start; {log} says why")
            print(line, end="", flush=True)
            yield found[1], found[2]
        finally:
            process.terminate()
            print(f"daemon stopped with exit code {process.wait(60)}")


def show(title: str) -> None:
    print(f"\n=== {title}", flush=True)


def half_mask(size: tuple[int, int]) -> Image.Image:
    """White, which is painted, on the right half."""
    mask = Image.new("L", size, 0)
    ImageDraw.Draw(mask).rectangle((size[0] // 2, 0, *size), fill=255)
    return mask


def contact_sheet(rows: list[list[Image.Image]]) -> Image.Image:
    width, height = rows[0][0].size
    columns = max(len(row) for row in rows)
    sheet = Image.new(
        "RGB", (columns * (width + MARGIN) + MARGIN, len(rows) * (height + MARGIN) + MARGIN), (235, 235, 240)
    )
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            sheet.paste(picture, (MARGIN + x * (width + MARGIN), MARGIN + y * (height + MARGIN)))
    return sheet.resize((sheet.width * 2, sheet.height * 2), Image.Resampling.LANCZOS)


def run(target: str, metrics: str, out: Path) -> None:
    client = Client(target, progress_bar=False)
    options: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "seed": 0}

    show("text-to-image: sixteen requests at once, joined step by step")
    text_to_image = AutoPipelineForText2Image.from_pretrained("demo", client=client)
    with ThreadPoolExecutor(len(PROMPTS)) as threads:
        results = list(threads.map(lambda prompt: text_to_image(prompt, **options), PROMPTS))
    pictures = {prompt: result.images[0] for prompt, result in zip(PROMPTS, results, strict=True)}
    shared = sum(result.timings.joined_calls for result in results) / sum(result.timings.calls for result in results)
    print(f"{len(pictures)} pictures; {shared:.0%} of the component calls shared a batch")

    show("image-to-image and inpainting: derived, without new weights")
    image_to_image = AutoPipelineForImage2Image.from_pipe(text_to_image)
    inpainting = AutoPipelineForInpainting.from_pipe(text_to_image)
    changed, painted = [], []
    for start, prompt in IMAGE_TO_IMAGE:
        result = image_to_image(prompt, image=pictures[start], strength=0.75, **options)
        changed += [pictures[start], result.images[0]]
        pictures[f"{start} to {prompt}"] = result.images[0]
    for start, prompt in INPAINTING:
        mask = half_mask(pictures[start].size)
        result = inpainting(prompt, image=pictures[start], mask_image=mask, strength=1.0, **options)
        painted += [pictures[start], mask.convert("RGB"), result.images[0]]
        pictures[f"{start} with {prompt}"] = result.images[0]

    for name, picture in pictures.items():
        picture.save(out / f"{name.replace(' ', '_')}.png")
    first = [pictures[prompt] for prompt in PROMPTS]
    contact_sheet([first[:8], first[8:], changed + painted[:3]]).save(out / "contact_sheet.png")
    print(f"{len(pictures)} pictures and contact_sheet.png in {out}/")

    for command in ("ps", "workers"):
        show(f"denoised {command}")
        subprocess.run([sys.executable, "-m", "denoised", command, "--target", target], check=True)

    show(f"metrics, from {metrics}")
    with urllib.request.urlopen(metrics, timeout=10) as response:
        for line in response.read().decode().splitlines():
            if line.startswith(METRICS):
                print(line)

    for pipeline in (text_to_image, image_to_image, inpainting):
        pipeline.unload()
    client.close()
    print("\nunloaded; ", end="")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the pictures (default: out)")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    with daemon(out / "daemon.log") as (target, metrics):
        run(target, metrics, out)


if __name__ == "__main__":
    main()
