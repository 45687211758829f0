"""Writes the blocking SDK from the asyncio one, word by word: client/denoised/aio/*.py → client/denoised/*.py.

`python client/unasync.py` writes; with `--check` it only says whether the two agree. A rule that no file needs any
more is an error, so that the table stays as short as the difference is.
"""

import re
import subprocess
import sys
from pathlib import Path

ASYNC = Path(__file__).parent / "denoised" / "aio"
SYNC = ASYNC.parent

WORDS = {
    # Names
    "AsyncClient": "Client",
    "AsyncFleet": "Fleet",
    "AsyncGenerationStream": "GenerationStream",
    "AsyncJob": "Job",
    "AsyncLoadStream": "LoadStream",
    "AsyncPipeline": "Pipeline",
    "AsyncGenerator[pb.GenerateResponse, None]": "Generator[pb.GenerateResponse, None, None]",
    "AsyncGenerator[pb.LoadPipelineResponse, None]": "Generator[pb.LoadPipelineResponse, None, None]",
    "asyncio.sleep(": "time.sleep(",
    "AsyncPipelineAdapters": "PipelineAdapters",
    "AsyncPipelineSettings": "PipelineSettings",
    "AsyncConversation": "Conversation",
    "AsyncStream": "Stream",
    "AsyncIterator": "Iterator",
    "AsyncGenerator[Event, None]": "Generator[Event, None, None]",
    "AsyncGenerator": "Generator",
    "from ..": "from .",
    "import grpc.aio": "import grpc",
    "grpc.aio.": "grpc.",
    # The language
    "async for event in call:\n                    yield event": "yield from call",
    "async def": "def",
    "async for": "for",
    "async with": "with",
    "await ": "",
    "aiter(": "iter(",
    "aclosing": "closing",
    "__aiter__": "__iter__",
    "__aenter__": "__enter__",
    "__aexit__": "__exit__",
    # A blocking call is never cancelled from outside, and belongs to no event loop.
    "(grpc.aio.AioRpcError, asyncio.CancelledError)": "grpc.RpcError",
    "# Channels of grpc.aio work in one event loop only.": "# The main thread stands for the whole process.",
    "asyncio.get_running_loop()": "threading.main_thread()",
    "import asyncio\n": "",
    "from asyncio import Queue": "from queue import SimpleQueue as Queue",
    "awaited": "unawaited",
    # A blocking assignment can wait for the daemon.
    "# An assignment cannot be awaited: `await pipe.set_scheduler(…)`.": (
        "@scheduler.setter\n    def scheduler(self, scheduler: NoiseSchedulerLike | None) -> None:\n"
        "        self.set_scheduler(scheduler)"
    ),
    # A blocking property may ask the daemon, so that what others did since is seen.
    "description.describe_components(self._info,": "description.describe_components(self.refresh()._info,",
    "description.describe_memory(self._info)": "description.describe_memory(self.refresh()._info)",
    "Attributes are as of the last answer from the daemon: `await pipe.refresh()` brings them up to date.": (
        "`components` and `memory` ask the daemon; other attributes are as of its last answer, see `refresh`."
    ),
}
# Longest first; a word ends where its last letter says so, so that "await " leaves "awaits" alone.
PATTERN = re.compile(
    "|".join((r"\b" if word[0].isalnum() else "") + re.escape(word) for word in sorted(WORDS, key=len, reverse=True))
)


def unasync(source: str) -> tuple[str, set[str]]:
    """The blocking text, not yet formatted, and the rules that it took."""
    used: set[str] = set()

    def replace(match: re.Match[str]) -> str:
        used.add(match.group())
        return WORDS[match.group()]

    return PATTERN.sub(replace, source), used


def tidy(source: str, path: Path) -> str:
    """As ruff would have it: shorter words make shorter lines, and other names sort in another order."""
    for command in (["check", "--quiet", "--select", "I", "--fix"], ["format", "--quiet"]):
        line = [sys.executable, "-m", "ruff", *command, "--stdin-filename", str(path), "-"]
        source = subprocess.run(line, input=source, text=True, capture_output=True, check=True).stdout
    return source


def main() -> None:
    stale, used = [], set[str]()
    for source in sorted(ASYNC.glob("[!_]*.py")):
        text, words = unasync(source.read_text())
        used |= words
        first, _, rest = text.partition("\n")
        target = SYNC / source.name
        text = tidy(f"{first}\n# Generated from aio/{source.name} by client/unasync.py: edit that one.\n{rest}", target)
        if target.exists() and target.read_text() == text:
            continue
        if "--check" in sys.argv:
            stale.append(target.name)
        else:
            target.write_text(text)
    if unused := [word for word in WORDS if word not in used]:
        sys.exit(f"client/unasync.py has rules that nothing needs: {unused}")
    if stale:
        sys.exit(f"out of date, run `python client/unasync.py`: {', '.join(stale)}")


if __name__ == "__main__":
    main()
