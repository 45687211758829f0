"""What a library said in an exception, fit to be shown to a client."""

from __future__ import annotations

import re

# Folders with spaces end at the last slash; whatever looks like a path goes.
FOLDERS = re.compile(r"(?:/[^/\n'\"`]+){2,}/")
PATHS = re.compile(r"(?:/[\w.@+-]+){2,}/?")
LIMIT = 400


def quote(error: BaseException) -> str:
    """The beginning of the message on one line, without paths and without the full stop."""
    text = FOLDERS.sub("…/", " ".join(str(error).split()))
    return PATHS.sub("…", text)[:LIMIT].rstrip(" .")
