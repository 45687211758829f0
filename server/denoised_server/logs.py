"""Logging of the daemon and its workers: one line an event, on stderr."""

from __future__ import annotations

import logging
import os

FORMAT = "%(asctime)s %(levelname)-7s %(process)d %(name)s: %(message)s"


def set_up(*, verbose: bool) -> None:
    """INFO and above; DEBUG of our own modules, and what the libraries under them advise, too when verbose."""
    if not verbose:
        # Read when they are imported, which is when they speak first: of packages that nothing here needs.
        for library in ("DIFFUSERS", "TRANSFORMERS"):
            os.environ.setdefault(f"{library}_VERBOSITY", "error")
    logging.basicConfig(format=FORMAT, level=logging.INFO, force=True)
    logging.getLogger("denoised_server").setLevel(logging.DEBUG if verbose else logging.INFO)
