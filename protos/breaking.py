"""Says whether the protos break what is known of them: compares with the commit that the work began from.

That is where the branch left main, or on main itself the commit before. Without git's history there is nothing to
compare with, and it says so.
"""

import io
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

PROTOS = Path(__file__).parent


def git(*arguments: str) -> bytes | None:
    done = subprocess.run(["git", *arguments], cwd=PROTOS, capture_output=True)
    return done.stdout if done.returncode == 0 else None


def base() -> str | None:
    """The commit to compare with."""
    head = git("rev-parse", "HEAD")
    for branch in ("origin/main", "main"):
        commit = git("merge-base", "HEAD", branch)
        if commit is not None and commit != head:
            return commit.decode().strip()
    parent = git("rev-parse", "--verify", "HEAD~1")
    return parent.decode().strip() if parent is not None else None


def main() -> None:
    commit = base()
    files = git("archive", commit, ".") if commit is not None else None
    if commit is None or files is None:
        print("protos: no earlier commit to compare with")
        return
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(files)) as archive:
            archive.extractall(folder, filter="data")
        buf = str(Path(sys.executable).parent / "buf")
        done = subprocess.run([buf, "breaking", "--against", folder], cwd=PROTOS)
    if done.returncode:
        sys.exit(f"the protos break what they were in {commit[:12]}")


if __name__ == "__main__":
    main()
