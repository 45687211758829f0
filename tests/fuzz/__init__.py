"""Requests that nobody would send, and sequences that nobody would think of.

Short by default, for every run of the tests; `make fuzz` sets DENOISED_FUZZ=long.
"""

import os

IS_LONG = os.environ.get("DENOISED_FUZZ") == "long"
