"""Logging of the daemon and its workers: one line an event, on stderr."""

from __future__ import annotations

import logging

FORMAT = "%(asctime)s %(levelname)-7s %(process)d %(name)s: %(message)s"


def set_up(*, verbose: bool) -> None:
    """INFO and above; DEBUG of our own modules too when verbose."""
    logging.basicConfig(format=FORMAT, level=logging.INFO, force=True)
    logging.getLogger("denoised_server").setLevel(logging.DEBUG if verbose else logging.INFO)
