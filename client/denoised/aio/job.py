"""A generation that goes on in the daemon, whatever becomes of this program."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from ..errors import InternalError
from ..progress import DenoisingBar
from ..result import PipelineOutput, assemble
from ..v1 import generation_service_pb2 as pb

if TYPE_CHECKING:
    from .client import AsyncClient


class AsyncJob:
    """A detached generation: get one from `pipe.submit(...)`, or from `client.generation(name)` with its name.

    Example:
        job = await pipe.submit("a red apple", num_inference_steps=50)
        print(job.name)  # from anywhere, later: job = await client.generation(name)
        image = (await job.result()).images[0]
    """

    __slots__ = ("_client", "_info")

    def __init__(self, client: AsyncClient, info: pb.Generation) -> None:
        self._client = client
        self._info = info

    @property
    def name(self) -> str:
        """The generation, "generations/{id}"."""
        return self._info.name

    @property
    def info(self) -> pb.Generation:
        """Everything that the daemon last said about it; `refresh` asks again."""
        return self._info

    @property
    def state(self) -> str:
        """ "waiting", "running", "succeeded", "failed" or "cancelled", as of the daemon's last answer."""
        return pb.Generation.State.Name(self._info.state).removeprefix("STATE_").lower()

    @property
    def progress(self) -> tuple[int, int]:
        """Steps done and steps in all, as of the daemon's last answer."""
        return self._info.progress.completed_steps, self._info.progress.total_steps

    async def refresh(self) -> AsyncJob:
        """Asks the daemon how it is. Raises GenerationNotFoundError when its result is not kept any more."""
        self._info = await self._client.get_generation(self.name)
        return self

    async def result(self, *, timeout: float | None = None) -> PipelineOutput:
        """Waits for the end and returns what it made, as `pipe(...)` would have. May be asked again and again.

        Shows a progress bar, and goes on over lost connections and a daemon that is started again.

        Args:
            timeout: Seconds to wait.

        Raises:
            GenerationNotFoundError: Its result is not kept any more.
            GenerationCancelledError: It was cancelled.
            DeadlineExceededError: It took longer than `timeout`; it goes on.
            DenoisedError: Whatever it failed with.
        """
        outputs: list[pb.Output] = []
        summary: pb.Summary | None = None
        bar = DenoisingBar({} if self._client.progress_bar else {"disable": True})
        try:
            async with contextlib.aclosing(aiter(self._client.resume(self.name, timeout=timeout))) as events:
                async for event in events:
                    match event.WhichOneof("event"):
                        case "queued":
                            bar.wait(event.queued.position)
                        case "progress":
                            bar.step(event.progress.completed_steps, event.progress.total_steps)
                        case "phase_began":
                            bar.enter(event.phase_began.phase)
                        case "output":
                            outputs.append(event.output)
                        case "summary":
                            summary = event.summary
        finally:
            bar.close()
        if summary is None:
            raise InternalError("The daemon ended the generation without a summary.")
        return assemble(outputs, summary, is_pil=self._info.output.output_type in ("", "pil"))

    async def cancel(self) -> None:
        """Ends it at its next step; one that is over stays as it is."""
        self._info = await self._client.cancel_generation(self.name)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}, {self.state}>"
