"""Downloads that go on where an earlier load ended, or an earlier process.

huggingface_hub gives each try a file of its own, and removes it when the try fails. Here what came so far stays beside
it, under the name that the file had in older versions, and the next try asks for the rest. Files that come through Xet
take another way and begin anew.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any, BinaryIO

from huggingface_hub import file_download
from huggingface_hub.constants import HF_HUB_CACHE

# What the Hub names large files by is their SHA-256; small ones are not worth going on with.
DIGEST = re.compile(r"[0-9a-f]{64}")

_get = file_download.http_get


def _http_get(url: str, temp_file: BinaryIO, **options: Any) -> None:
    path = Path(temp_file.name)
    digest = path.name.partition(".")[0]
    kept = path.with_name(f"{digest}.incomplete")
    if path == kept or not DIGEST.fullmatch(digest):
        _get(url, temp_file, **options)
        return
    with kept.open("ab") as file:
        already = file.tell()
        if already > (options.get("expected_size") or already):
            already = file.truncate(0)
        _get(url, file, **options, resume_size=already)
    if already and not _is_whole(kept, digest):
        kept.unlink()
        raise OSError(f"Consistency check failed: what came of {digest} before does not go with the rest.")
    # The open file stays as it is; it is its name that is moved into the cache.
    kept.replace(path)


def _is_whole(path: Path, digest: str) -> bool:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == digest


def install() -> None:
    """For all downloads of the process."""
    file_download.http_get = _http_get


def forget(repo_id: str) -> None:
    """Removes what came of a repository's files so far, for a download that is to begin anew."""
    blobs = Path(HF_HUB_CACHE).expanduser() / f"models--{repo_id.replace('/', '--')}" / "blobs"
    for path in blobs.glob("*.incomplete"):
        path.unlink(missing_ok=True)
