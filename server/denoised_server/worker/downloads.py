"""Downloads from the Hugging Face Hub: reported, resumed where a connection broke, left at once when cancelled."""

from __future__ import annotations

import contextlib
import glob
import json
import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

from denoised.errors import GatedRepoError, HubUnreachableError, NotAPipelineError, RepoNotFoundError
from denoised_server.messages import Access, AdapterSource, ComponentSource, LoadProgress, Spec
from diffusers import DiffusionPipeline
from diffusers.pipelines import pipeline_utils
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub import errors as hub_errors
from tqdm import tqdm

from . import resuming, weights

logger = logging.getLogger(__name__)

# What describes a pipeline, as diffusers fetches it for a single file.
CONFIGURATION = ("*.json", "*.txt", "*.model")
REPORT_SECONDS = 0.1
RETRY_SECONDS = 10.0
# Diffusers' own download takes no bar: it finds the one of its thread here.
_thread = threading.local()


class LeftError(Exception):
    """Ends a download that nobody waits for any more."""


class _FailedError(Exception):
    """What a download failed with, told apart from what its caller is cancelled with."""

    def __init__(self, error: Exception) -> None:
        self.error = error


class Downloads:
    """Downloads of one load, each on a thread of its own, so that a Hub that hangs cannot hold up a cancel."""

    def __init__(
        self, access: Access, progress: Callable[[LoadProgress], None], check_cancelled: Callable[[], None]
    ) -> None:
        self._access, self._progress, self._check_cancelled = access, progress, check_cancelled

    def pipeline(self, spec: Spec) -> str:
        """Brings the files of a pipeline into the cache, and returns their commit. What is overridden is left there."""
        repo_id, revision = spec.repo_id, spec.revision

        def is_whole(folder: Path) -> bool:
            return _has_pipeline(folder / spec.subfolder, spec)

        if spec.subfolder:
            return self._snapshot(repo_id, revision, [f"{spec.subfolder}/*"], is_whole)

        def download(local_files_only: bool) -> str:
            return str(
                DiffusionPipeline.download(
                    repo_id,
                    revision=revision or None,
                    variant=spec.variant or None,
                    use_safetensors=spec.use_safetensors,
                    token=self._access.token or None,
                    local_files_only=local_files_only,
                    force_download=self._access.force_download,
                    # With the README then, which names what is connected.
                    load_connected_pipeline=True,
                    **dict.fromkeys(spec.overrides),
                )
            )

        return self._run(repo_id, revision, download, is_whole)

    def connected(self, spec: Spec) -> None:
        """Brings a pipeline that another one's README names. It names no commit: what the cache has will do."""
        local = Downloads(replace(self._access, local_files_only=True), self._progress, self._check_cancelled)
        if not self._access.force_download:
            with contextlib.suppress(RepoNotFoundError, NotAPipelineError):
                local.pipeline(spec)
                return
        self.pipeline(spec)

    def single_file(self, spec: Spec) -> str:
        """Brings a file with all weights into the cache, with what describes it if nothing else does; its commit."""
        name = str(Path(spec.subfolder, spec.single_file))
        patterns = [glob.escape(name), *(CONFIGURATION if spec.config_source is None else ())]

        def download(local_files_only: bool) -> str:
            folder = self._download_snapshot(spec.repo_id, spec.revision, patterns, local_files_only)
            if not (local_files_only or Path(folder, name).is_file()):
                raise ValueError(f"{name} is not there")
            return folder

        return self._run(spec.repo_id, spec.revision, download, lambda folder: (folder / name).is_file())

    def configuration(self, source: ComponentSource) -> str:
        """Brings what describes a pipeline into the cache, none of its weights, and returns its commit."""
        return self._snapshot(
            source.repo_id, source.revision, [*CONFIGURATION], lambda folder: (folder / "model_index.json").is_file()
        )

    def component(self, source: ComponentSource) -> str:
        """Brings the files of one component into the cache, and returns their commit."""
        folder = f"{source.subfolder}/" if source.subfolder else ""

        def download(local_files_only: bool) -> str:
            patterns = [f"{folder}*", "model_index.json"]
            if not local_files_only:
                files = HfApi().list_repo_files(
                    source.repo_id, revision=source.revision or None, token=self._access.token or None
                )
                inside = [file.removeprefix(folder) for file in files if file.startswith(folder)]
                inside = [file for file in inside if "/" not in file]
                chosen = weights.choose(inside, variant=source.variant, use_safetensors=source.use_safetensors)
                others = [name for name in inside if Path(name).suffix in (".json", ".txt", ".model", ".spm")]
                patterns = [*(folder + name for name in (*chosen, *others)), "model_index.json"]
            return self._download_snapshot(source.repo_id, source.revision, patterns, local_files_only)

        def is_whole(found: Path) -> bool:
            return _has_component(found / folder, source.variant, source.use_safetensors)

        return self._run(source.repo_id, source.revision, download, is_whole)

    def adapter(self, source: AdapterSource, choose: Callable[[Iterable[str]], str]) -> Path:
        """Brings the file of an adapter into the cache: without a name, the one that `choose` takes of those there."""

        def download(local_files_only: bool) -> str:
            revision, token = source.revision or None, self._access.token or None
            name = source.weight_name
            if not name and not local_files_only:
                folder = f"{source.subfolder}/" if source.subfolder else ""
                files = HfApi().list_repo_files(source.repo_id, revision=revision, token=token)
                inside = (file.removeprefix(folder) for file in files if file.startswith(folder))
                name = choose(file for file in inside if "/" not in file and file.endswith(".safetensors"))
            path: str = hf_hub_download(
                source.repo_id,
                name,
                subfolder=source.subfolder or None,
                revision=revision,
                token=token,
                local_files_only=local_files_only,
            )
            return path

        try:
            return Path(self._fetch(source.repo_id, source.revision, download, Path.is_file))
        except NotAPipelineError:
            raise RepoNotFoundError(
                f"There is no adapter {source.weight_name or '*.safetensors'!r} in {source.subfolder or '.'!r} of "
                f"{source.repo_id!r}.",
                hint="Check repo_id, subfolder and weight_name.",
            ) from None

    def _snapshot(self, repo_id: str, revision: str, patterns: list[str], is_whole: Callable[[Path], bool]) -> str:
        def download(local_files_only: bool) -> str:
            return self._download_snapshot(repo_id, revision, patterns, local_files_only)

        return self._run(repo_id, revision, download, is_whole)

    def _download_snapshot(self, repo_id: str, revision: str, patterns: list[str], local_files_only: bool) -> str:
        return str(
            pipeline_utils.snapshot_download(
                repo_id,
                revision=revision or None,
                allow_patterns=patterns,
                token=self._access.token or None,
                local_files_only=local_files_only,
            )
        )

    def _run(
        self, repo_id: str, revision: str, download: Callable[[bool], str], is_whole: Callable[[Path], bool]
    ) -> str:
        """The commit that a download is of."""
        return Path(self._fetch(repo_id, revision, download, is_whole)).name

    def _fetch(
        self, repo_id: str, revision: str, download: Callable[[bool], str], is_whole: Callable[[Path], bool]
    ) -> str:
        """What `download` returns, with local files only if those are enough; `is_whole` says whether they are."""

        def find() -> str:
            found = download(True)
            if not is_whole(Path(found)):
                raise hub_errors.LocalEntryNotFoundError("the cache has the commit, for the sake of other files")
            return found

        try:
            # What a recipe was resolved to is in the cache, and needs neither the Hub nor the token that brought it.
            if weights.is_commit(revision) and not self._access.force_download:
                try:
                    return self._in_thread(find)
                except _FailedError:
                    logger.debug("%s is not in the cache yet", repo_id)
            return self._in_thread(find if self._access.local_files_only else lambda: download(False))
        except _FailedError as failed:
            logger.debug("download of %s failed", repo_id, exc_info=True)
            raise _translate(repo_id, revision, failed.error) from None

    def _in_thread(self, download: Callable[[], str]) -> str:
        outcome: Future[str] = Future()
        bars = _Bars(self._access.force_download)

        def run() -> None:
            _thread.bars = bars
            try:
                outcome.set_result(download())
            except BaseException as error:
                outcome.set_exception(error)

        threading.Thread(target=run, name="download", daemon=True).start()
        try:
            reported = None
            while not outcome.done():
                self._check_cancelled()
                wait([outcome], REPORT_SECONDS)
                if (now := bars.bytes) != reported and now[1]:
                    self._progress(LoadProgress("downloading", "", *now))
                    reported = now
            if isinstance(error := outcome.exception(), Exception):
                raise _FailedError(error)
            return outcome.result()
        finally:
            bars.is_left.set()


def _has_pipeline(folder: Path, spec: Spec) -> bool:
    try:
        index = json.loads((folder / "model_index.json").read_text())
    except (OSError, ValueError):
        return False
    return all(
        _has_component(folder / role, spec.variant, spec.use_safetensors)
        for role, entry in index.items()
        if isinstance(entry, list) and entry and entry[0] is not None and role not in spec.overrides
    )


def _has_component(folder: Path, variant: str, use_safetensors: bool | None) -> bool:
    """Whether there is something, and what describes weights is not there without them."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    has_weights = bool(weights.choose(names, variant=variant, use_safetensors=use_safetensors))
    return bool(names) and (has_weights or "config.json" not in names)


class _Bars:
    """Stands in for the progress bars of one download: counts bytes, and ends it when it was left."""

    def __init__(self, force: bool) -> None:
        self.force = force
        self.is_left = threading.Event()
        self._bars: list[Any] = []
        bars = self

        class Bar(tqdm):  # type: ignore[type-arg]
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                self.counts_bytes = kwargs.get("unit") == "B"
                kwargs.pop("name", None)
                super().__init__(*args, **kwargs | {"disable": True})
                bars._bars.append(self)

            def update(self, n: float | None = 1) -> bool | None:
                if bars.is_left.is_set():
                    raise LeftError
                self.n += n or 0
                return None

        self.bar_class = Bar

    @property
    def bytes(self) -> tuple[int, int]:
        """Bytes so far, and in all as far as that is known."""
        counting = [(int(bar.n), int(bar.total or 0)) for bar in tuple(self._bars) if bar.counts_bytes]
        # Newer versions show what came and what was written, and both are of the same files.
        return max(counting, default=(0, 0))


def _snapshot_download(*args: Any, **kwargs: Any) -> Any:
    bars: _Bars | None = getattr(_thread, "bars", None)
    if bars is not None:
        kwargs = {"tqdm_class": bars.bar_class, "force_download": bars.force, **kwargs}
        if bars.force:
            resuming.forget(str(args[0]))
    return snapshot_download(*args, **kwargs)


pipeline_utils.snapshot_download = _snapshot_download
resuming.install()


def _translate(repo_id: str, revision: str, error: Exception) -> Exception:
    causes = list(_causes(error))
    where = f"{repo_id!r} at revision {revision!r}" if revision else f"{repo_id!r}"
    if any(isinstance(cause, hub_errors.GatedRepoError) for cause in causes) or 403 in map(_status, causes):
        return GatedRepoError(
            f"The Hub does not give access to {where}.",
            hint="Accept its licence on the Hub, and log in where the daemon runs (`hf auth login`) or send a token.",
        )
    if any(isinstance(cause, hub_errors.RevisionNotFoundError) for cause in causes):
        return RepoNotFoundError(f"There is no revision {revision!r} of {repo_id!r}.", hint="Check the revision.")
    if any(isinstance(cause, hub_errors.RepositoryNotFoundError) for cause in causes):
        return RepoNotFoundError(
            f"The Hub has no repository {repo_id!r} that may be read.",
            hint="Check its name. If it is private, log in where the daemon runs (`hf auth login`) or send a token.",
        )
    if any(map(_is_network, causes)):
        return HubUnreachableError(
            f"{where} cannot be downloaded: the Hub cannot be reached, or broke off.",
            hint="Check the daemon's network and HF_ENDPOINT. Files that came whole are kept for the next try.",
            retry_after=RETRY_SECONDS,
        )
    if any(map(_is_offline, causes)):
        return RepoNotFoundError(
            f"{where} is not in the daemon's cache, and the Hub may not be asked.",
            hint="Let the daemon go online (local_files_only, HF_HUB_OFFLINE), or name what it has.",
        )
    if not isinstance(error, OSError | ValueError | TypeError | AttributeError | hub_errors.HfHubHTTPError):
        return error
    return NotAPipelineError(
        f"{where} is no diffusers pipeline, or lacks files that it names.",
        hint="Check its name, its variant, and whether it has files of the format that was asked for.",
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        yield error
        seen.add(id(error))
        error = error.__cause__ or error.__context__


def _status(error: BaseException) -> int:
    return int(getattr(getattr(error, "response", None), "status_code", 0) or 0)


def _is_network(error: BaseException) -> bool:
    """httpx, httpx2 or requests, whichever the installed version uses, and what it says of broken files."""
    if status := _status(error):
        return status == 429 or status >= 500
    library = type(error).__module__.partition(".")[0]
    cut_short = isinstance(error, OSError) and "Consistency check failed" in str(error)
    return library in ("httpx", "httpx2", "httpcore", "requests", "urllib3") or cut_short


def _is_offline(error: BaseException) -> bool:
    absent = hub_errors.LocalEntryNotFoundError, hub_errors.OfflineModeIsEnabled
    return isinstance(error, absent) or type(error).__name__ == "RevisionResolutionError"
