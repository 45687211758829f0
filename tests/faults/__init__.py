"""Daemons that are hurt on purpose.

Short by default, for every run of the tests; `make faults` sets DENOISED_FAULTS=long.
"""

import os

IS_LONG = os.environ.get("DENOISED_FAULTS") == "long"
