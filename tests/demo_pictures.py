"""What the demo model was trained on, small: 16×16 pixels each, so that a test needs no font.

python -m tests.demo_pictures           # draws demo_pictures.png again, from the font
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from denoised_server.demo import train
from PIL import Image

SHEET = Path(__file__).with_suffix(".png")
SIDE, COLUMNS = 16, 16
CAPTIONS = [train.caption(character) for character in train.PICTURES]


def shrink(image: Image.Image) -> np.ndarray:
    """Shape (16, 16, 3), in [0, 1]."""
    small = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32) / 255


def pictures() -> np.ndarray:
    """In the order of CAPTIONS; shape (captions, 16, 16, 3), in [0, 1]."""
    with Image.open(SHEET) as sheet:
        rows = np.asarray(sheet.convert("RGB"), dtype=np.float32) / 255
    grid = rows.reshape(-1, SIDE, COLUMNS, SIDE, 3).swapaxes(1, 2).reshape(-1, SIDE, SIDE, 3)
    return grid[: len(CAPTIONS)]


def nearest(image: Image.Image, known: np.ndarray) -> str:
    """Caption of the training picture with the smallest root mean square error."""
    return CAPTIONS[int(((known - shrink(image)) ** 2).mean((1, 2, 3)).argmin())]


def main() -> None:
    rows = -(-len(CAPTIONS) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * SIDE, rows * SIDE), "white")
    for index, character in enumerate(train.PICTURES):
        small = train.render(character, train.PICTURE_SIZE, (0, 0)).resize((SIDE, SIDE), Image.Resampling.BOX)
        sheet.paste(small, (index % COLUMNS * SIDE, index // COLUMNS * SIDE))
    sheet.save(SHEET, optimize=True)


if __name__ == "__main__":
    main()
