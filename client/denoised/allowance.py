"""How much a receiver decodes of one request: small files can hold pictures of any size."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import InvalidMediaError

# Whatever their number, the pictures of one request may take as many pixels as so many of the largest ones.
PICTURES = 16


@dataclass(slots=True)
class Allowance:
    """Of one request. `image_pixels` bounds each picture, `left` all that are still to come."""

    image_pixels: int
    left: int

    @classmethod
    def of(cls, image_pixels: int) -> Allowance:
        return cls(image_pixels, PICTURES * image_pixels)

    def take(self, width: int, height: int) -> None:
        """Called with what a picture's header says, before its pixels are read. Raises InvalidMediaError."""
        pixels = width * height
        if pixels > self.image_pixels:
            raise InvalidMediaError(
                f"An image has {width:,} x {height:,} pixels; it may have {self.image_pixels:,}.",
                hint="Send a smaller one, or raise the daemon's setting max_pixels.",
            )
        if pixels > self.left:
            raise InvalidMediaError(
                "The images of the request have too many pixels together.", hint="Send fewer or smaller ones."
            )
        self.left -= pixels


# For places where no pictures belong.
NUMBERS_ONLY = Allowance(0, 0)
