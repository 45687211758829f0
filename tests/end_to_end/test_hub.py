"""Loading from the Hugging Face Hub, which here is a small one on this machine: real huggingface_hub, real sockets."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import denoised
import numpy as np
import pytest
import torch
from denoised import Client, errors
from denoised.v1 import pipeline_service_pb2 as pb
from diffusers import StableDiffusionPipeline
from PIL import Image

from tests import adapter_files, checkpoints, single_file
from tests.daemon import Daemon
from tests.hub import Hub
from tests.parity.checkpoints import kandinsky

ONE: dict[str, Any] = {"num_inference_steps": 2}
LARGE_BYTES = 24 * 2**20
TOKEN = "hf_onlyForThisLoad"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("repositories")
    return {
        "sd": checkpoints.stable_diffusion(root / "sd"),
        "other": checkpoints.stable_diffusion(root / "other", seed=7),
        "net": checkpoints.controlnet(root / "net"),
        "large": large(checkpoints.stable_diffusion(root / "large")),
    }


def large(folder: Path) -> Path:
    """With a file of more than the pieces of 10 MiB that huggingface_hub writes."""
    (folder / "tokenizer" / "large.json").write_bytes(b" " * LARGE_BYTES)
    return folder


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        yield hub


def serving(tmp_path: Path, hub: Hub, **options: Any) -> Daemon:
    variables: dict[str, Any] = {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DOWNLOAD_TIMEOUT": "30",
    }
    return Daemon(tmp_path / "state", **options, **variables)


@pytest.fixture
def daemon(tmp_path: Path, hub: Hub) -> Iterator[Daemon]:
    with serving(tmp_path, hub) as daemon:
        yield daemon
        assert TOKEN not in "".join(daemon.log)
        assert not any(
            TOKEN.encode() in path.read_bytes() for path in (tmp_path / "state").rglob("*") if path.is_file()
        )


def load(client: Client, repo: str, **options: Any) -> denoised.Pipeline:
    return client.load(repo, task="text-to-image", **options)


def test_a_repository_is_downloaded_once_and_resolved_to_its_commit(
    hub: Hub, daemon: Daemon, folders: dict[str, Path]
) -> None:
    repository = hub.add("owner/sd", folders["sd"])
    reports: list[pb.LoadProgress] = []
    with daemon.client() as client:
        pipe = load(client, "owner/sd", on_progress=reports.append)
        assert pipe.info.spec.revision == repository.commit
        assert len(hub.downloads("unet/diffusion_pytorch_model.safetensors")) == 1
        again = load(client, "owner/sd", revision=repository.commit)
        assert again.memory.exclusive_bytes == 0
        assert len(hub.downloads("unet/diffusion_pytorch_model.safetensors")) == 1
        assert pipe("a", num_inference_steps=2).images
        with pytest.raises(errors.RepoNotFoundError, match="no revision 'nope'"):
            load(client, "owner/sd", revision="nope")
        load(client, "owner/sd", force_download=True)
        assert len(hub.downloads("unet/diffusion_pytorch_model.safetensors")) == 2
    downloading = [report for report in reports if report.phase == "downloading"]
    assert downloading
    size = sum((folders["sd"] / "unet" / name).stat().st_size for name in ("diffusion_pytorch_model.safetensors",))
    assert downloading[-1].total_bytes > size
    assert downloading[-1].completed_bytes <= downloading[-1].total_bytes


def test_a_component_is_downloaded_by_itself(hub: Hub, daemon: Daemon, folders: dict[str, Path]) -> None:
    hub.add("owner/sd", folders["sd"])
    net, other = hub.add("owner/net", folders["net"]), hub.add("owner/other", folders["other"])
    with daemon.client() as client:
        controlnet = denoised.ControlNetModel.from_pretrained("owner/net")
        unet = denoised.UNet2DConditionModel.from_pretrained("owner/other", subfolder="unet")
        pipe = load(client, "owner/sd", overrides={"controlnet": [controlnet], "unet": unet})
        assert pipe.info.pipeline_class == "StableDiffusionControlNetPipeline"
        assert len(hub.downloads("/owner/other/")) == len(hub.downloads("/owner/other/resolve")) > 0
        assert not any("/vae/" in line for line in hub.downloads("/owner/other/"))
        # What is overridden is not asked for.
        assert not any("/owner/sd/" in line for line in hub.downloads("/unet/diffusion"))
        # A rebuild takes what was loaded, not what the branch is at by then.
        given = pipe.info.spec.overrides
        assert given["unet"].component.revision == other.commit
        assert given["controlnet"].components.components[0].revision == net.commit


def test_a_single_file_is_downloaded_by_itself_and_its_configuration_without_weights(
    hub: Hub, daemon: Daemon, folders: dict[str, Path], tmp_path: Path
) -> None:
    file = single_file.save(folders["sd"], tmp_path / "one" / "model.safetensors")
    one, sd = hub.add("owner/one", file.parent), hub.add("owner/sd", folders["sd"])
    with daemon.client() as client:
        # The cache knows the commit then, without the file.
        with pytest.raises(errors.NotAPipelineError):
            load(client, "owner/one", single_file="absent.safetensors", config="owner/sd")
        pipe = load(client, "owner/one", single_file="model.safetensors", config="owner/sd")
        assert pipe("a", num_inference_steps=2).images
        assert pipe.info.spec.revision == one.commit
        assert pipe.info.spec.config_source.revision == sd.commit
        assert not any("/owner/sd/" in line for line in hub.downloads(".safetensors"))
        again = load(client, "owner/one", single_file="model.safetensors", config="owner/sd", revision=one.commit)
        assert again.memory.exclusive_bytes == 0
        assert len(hub.downloads("/owner/one/")) == 1
        # The cache knows this commit, for the sake of its configuration.
        with pytest.raises(errors.RepoNotFoundError):
            load(client, "owner/sd", revision=sd.commit, local_files_only=True)
        assert load(client, "owner/sd", revision=sd.commit)("a", num_inference_steps=2).images


@pytest.mark.parametrize("is_local", [False, True], ids=["of the Hub", "of a directory"])
def test_what_a_readme_names_comes_from_the_hub_too(hub: Hub, tmp_path: Path, is_local: bool) -> None:
    decoder, prior = tmp_path / "decoder", tmp_path / "decoder-prior"
    kandinsky.kandinsky22(decoder)
    (decoder / "README.md").write_text("---\nprior:\n- owner/prior\n---\n")
    hub.add("owner/decoder", decoder)
    hub.add("owner/prior", prior)
    with serving(tmp_path, hub, allow=[decoder]) as daemon, daemon.client() as client:
        name = str(decoder) if is_local else "owner/decoder"
        pipe = load(client, name)
        assert pipe.info.pipeline_class == "KandinskyV22CombinedPipeline"
        assert pipe("a", prior_num_inference_steps=2, height=64, width=64, **ONE).images
        asked = len(hub.downloads("/owner/prior/"))
        assert asked
        assert load(client, name, local_files_only=True).components
        assert len(hub.downloads("/owner/prior/")) == asked


def test_adapters_come_from_the_hub(hub: Hub, daemon: Daemon, folders: dict[str, Path], tmp_path: Path) -> None:
    local = StableDiffusionPipeline.from_pretrained(folders["sd"])
    local.set_progress_bar_config(disable=True)
    files = tmp_path / "adapters"
    adapter_files.lora(files / "ink.safetensors", unet=local.unet, text_encoder=local.text_encoder)
    adapter_files.textual_inversion(files / "words" / "learned_embeds.safetensors", "<thing>")
    adapter_files.ip_adapter(files / "models", local.unet)
    hub.add("owner/sd", folders["sd"])
    repository = hub.add("owner/adapters", files)
    hub.add("owner/gated", files, gated=True)
    asked: dict[str, Any] = {"prompt": "a <thing>", "num_inference_steps": 2, "output_type": "np"}

    def adapt(pipe: Any, source: object) -> None:
        pipe.load_lora_weights(source, adapter_name="ink")
        pipe.load_textual_inversion(source, subfolder="words")
        pipe.load_ip_adapter(source, subfolder="models", weight_name="ip-adapter.safetensors")

    with daemon.client() as client:
        pipe = load(client, "owner/sd")
        adapt(pipe, "owner/adapters")
        sources = [source for call in pipe.info.settings.adapters for source in call.sources]
        # A rebuild takes what was loaded then, and needs no Hub to know which files those were.
        assert {source.revision for source in sources} == {repository.commit}
        assert sources[0].weight_name == "ink.safetensors"
        for wrong, kind in (("owner/gated", errors.GatedRepoError), ("owner/none", errors.RepoNotFoundError)):
            with pytest.raises(kind):
                pipe("a", adapters=[wrong], **ONE)
        with pytest.raises(errors.RepoNotFoundError, match=r"no adapter 'none\.safetensors'"):
            pipe("a", adapters=[denoised.Adapter("owner/adapters", weight_name="none.safetensors")], **ONE)
        plain = load(client, "owner/sd")
        for_one_call = plain("a", adapters=["owner/adapters"], seed=1, batching="forbid", output_type="np", **ONE)
        hub.__exit__()
        with pytest.raises(errors.HubUnreachableError):
            plain("a", adapters=["owner/adapters"], **ONE)
        daemon.workers()[0].kill()
        while not client.workers()[0].restart_count:
            time.sleep(0.05)
        picture = Image.effect_noise((48, 40), 80).convert("RGB")
        there = pipe(**asked, ip_adapter_image=picture, seed=1, batching="forbid").images
    local.load_lora_weights(files, weight_name="ink.safetensors")
    here = local("a", generator=torch.Generator().manual_seed(1), output_type="np", **ONE).images
    np.testing.assert_array_equal(for_one_call.images, here)
    local.unload_lora_weights()
    adapt(local, files)
    here = local(**asked, ip_adapter_image=picture, generator=torch.Generator().manual_seed(1)).images
    np.testing.assert_array_equal(there, here)


def test_gated_and_private_repositories_take_the_token_of_one_load(
    hub: Hub, daemon: Daemon, folders: dict[str, Path]
) -> None:
    hub.add("owner/gated", folders["sd"], gated=True, tokens={TOKEN})
    hub.add("owner/private", folders["other"], private=True, tokens={TOKEN})
    with daemon.client() as client:
        with pytest.raises(errors.GatedRepoError, match="licence") as caught:
            load(client, "owner/gated")
        assert caught.value.code == "PERMISSION_DENIED"
        with pytest.raises(errors.GatedRepoError):
            load(client, "owner/gated", hub_token="hf_somebodyElse")
        with pytest.raises(errors.RepoNotFoundError, match="private"):
            load(client, "owner/private")
        with pytest.raises(errors.RepoNotFoundError):
            load(client, "owner/nothing")
        pipe = denoised.AutoPipelineForText2Image.from_pretrained("owner/gated", token=TOKEN, client=client)
        assert pipe("a", num_inference_steps=2).images
        private = denoised.AutoPipelineForText2Image.from_pretrained("owner/private", token=TOKEN, client=client)
        assert TOKEN not in str(private.info)
        assert f"Bearer {TOKEN}" in hub.authorizations
        # What has been downloaded is there, also after a death and without a token.
        daemon.workers()[0].kill()
        while not client.workers()[0].restart_count:
            time.sleep(0.05)
        assert pipe("a", num_inference_steps=2).images


def test_what_is_no_pipeline_says_so(hub: Hub, daemon: Daemon, folders: dict[str, Path], tmp_path: Path) -> None:
    hub.add("owner/net", folders["net"])
    with daemon.client() as client, pytest.raises(errors.NotAPipelineError):
        load(client, "owner/net")


@pytest.mark.parametrize("status", [500])
def test_a_hub_that_fails_is_no_missing_repository(hub: Hub, daemon: Daemon, status: int) -> None:
    hub.failing = status
    with daemon.client() as client, pytest.raises(errors.HubUnreachableError) as caught:
        load(client, "owner/sd", timeout=60)
    assert caught.value.retry_after
    assert caught.value.code == "UNAVAILABLE"


def test_what_is_in_the_cache_needs_no_hub(hub: Hub, daemon: Daemon, folders: dict[str, Path]) -> None:
    hub.add("owner/sd", folders["sd"])
    with daemon.client() as client:
        with pytest.raises(errors.RepoNotFoundError, match="may not be asked"):
            load(client, "owner/sd", local_files_only=True)
        assert not hub.downloads()
        pipe = load(client, "owner/sd")
        asked = len(hub.requests)
        load(client, "owner/sd", local_files_only=True)
        assert len(hub.requests) == asked
        hub.__exit__()
        load(client, "owner/sd", revision=pipe.info.spec.revision)
        with pytest.raises(errors.HubUnreachableError, match="network"):
            load(client, "owner/other", timeout=60)


def begin(action: Callable[[], object]) -> tuple[threading.Thread, list[BaseException]]:
    failed: list[BaseException] = []

    def run() -> None:
        try:
            action()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, failed


def test_a_download_that_hangs_is_left_at_once_and_holds_nobody_up(
    hub: Hub, daemon: Daemon, folders: dict[str, Path]
) -> None:
    hub.add("owner/large", folders["large"])
    hub.hang_after = 12 * 2**20
    with daemon.client(timeout=None) as client:
        # Its call ends by its deadline, as one whose caller left does.
        thread, failed = begin(lambda: load(client, "owner/large", timeout=6, pipeline_id="slow"))
        assert hub.hanging.wait(30)
        began = time.monotonic()
        assert client.load("demo", timeout=30).components
        assert time.monotonic() - began < 6
        thread.join(30)
        assert isinstance(failed[0], errors.DeadlineExceededError)
        # The id is free as soon as nothing of it is left, though the Hub still hangs.
        client.load("demo", pipeline_id="slow", timeout=5)
        assert client.workers()[0].memory.reserved_bytes == 0
        # Files that came whole are not asked for again.
        hub.hang_after = None
        hub.released.set()
        assert load(client, "owner/large", timeout=60).components
    counts = [len(hub.downloads(name)) for name in ("unet/diffusion", "vae/diffusion")]
    assert counts == [1, 1]


def test_a_download_goes_on_where_it_was_cut_short(hub: Hub, daemon: Daemon, folders: dict[str, Path]) -> None:
    hub.add("owner/large", folders["large"])
    hub.cut_after = 12 * 2**20
    with daemon.client(timeout=120) as client:
        assert load(client, "owner/large").components
    assert starts(hub) == [10 * 2**20]


def test_a_download_goes_on_where_a_process_that_died_left_it(
    hub: Hub, daemon: Daemon, folders: dict[str, Path], tmp_path: Path
) -> None:
    hub.add("owner/large", folders["large"])
    hub.hang_after = 12 * 2**20
    blobs = tmp_path / "cache" / "models--owner--large" / "blobs"
    digest = hashlib.sha256((folders["large"] / "tokenizer" / "large.json").read_bytes()).hexdigest()
    part = blobs / f"{digest}.incomplete"
    with daemon.client(timeout=120) as client:
        thread, _ = begin(lambda: load(client, "owner/large", pipeline_id="cut"))
        assert hub.hanging.wait(30)
        hub.hang_after = None
        while not (part.exists() and part.stat().st_size):
            time.sleep(0.05)
        daemon.workers()[0].kill()
        hub.released.set()
        thread.join(60)
        assert load(client, "owner/large").components
        (begun,) = starts(hub)
        assert begun > 0
        assert not part.exists()

        # What came before is no part of the file: it is not believed, and the next try begins anew.
        (blobs / digest).unlink()
        part.write_bytes(b"x" * 2**20)
        with pytest.raises(errors.HubUnreachableError):
            load(client, "owner/large", revision="main")
        assert load(client, "owner/large", revision="main").components
    assert starts(hub) == [begun, 2**20]


def starts(hub: Hub) -> list[int]:
    """Where requests for parts of files began."""
    return [int(wanted.removeprefix("bytes=").partition("-")[0]) for wanted in hub.ranges]


def test_half_precision_of_a_repository_is_kept_where_that_is_asked_for(
    hub: Hub, daemon: Daemon, folders: dict[str, Path], tmp_path: Path
) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(folders["sd"], torch_dtype=torch.float16)
    pipe.save_pretrained(tmp_path / "half", variant="fp16")
    hub.add("owner/half", tmp_path / "half")
    with daemon.client() as client:
        loaded = load(client, "owner/half", variant="fp16", dtype="auto")
        assert {part.dtype for part in loaded.components.values() if part.digest} == {"float16"}
        assert all("fp16" in line for line in hub.downloads(".safetensors"))


def test_a_plan_knows_what_is_on_the_hub_by_its_headers(
    daemon: Daemon, hub: Hub, folders: dict[str, Path], tmp_path: Path
) -> None:
    hub.add("o/sd", folders["sd"])
    hub.add("o/net", folders["net"])
    hub.add("o/single", single_file.save(folders["sd"], tmp_path / "single" / "all.safetensors").parent)
    hub.add("o/gated", folders["other"], gated=True, tokens={TOKEN})
    with Client(daemon.target) as client:
        plan = client.plan("o/sd")
        weights = sum(path.stat().st_size for path in folders["sd"].glob("*/*.safetensors"))
        assert (plan.outcome, plan.download_bytes) == ("fits", weights)
        assert hub.sent_bytes < weights / 10
        assert not list((tmp_path / "cache").rglob("*.safetensors")), "nothing of it is kept"
        with_net = client.plan("o/sd", overrides={"controlnet": denoised.ControlNetModel.from_pretrained("o/net")})
        assert {part.role for part in with_net.components} - {part.role for part in plan.components} == {"controlnet"}
        single = client.plan("o/single", single_file="all.safetensors", config="o/sd")
        assert {part.role for part in single.components} == {part.role for part in plan.components}
        with pytest.raises(errors.GatedRepoError):
            client.plan("o/gated")
        assert client.plan("o/gated", hub_token=TOKEN).new_bytes == plan.new_bytes
        with pytest.raises(errors.RepoNotFoundError):
            client.plan("o/sd", local_files_only=True)
        with pytest.raises(errors.RepoNotFoundError):
            client.plan("o/absent")
        pipe = client.load("o/sd")
        assert {part.digest for part in plan.components} == {
            part.digest for part in pipe.components.values() if part.digest
        }
        again = client.plan("o/sd")
        assert (again.new_bytes, again.shared_bytes, again.download_bytes) == (0, plan.new_bytes, 0)
        assert client.plan("o/sd", local_files_only=True) == again
        # What a fine-tune has in common is known before a byte of it comes.
        tuned = client.plan("o/gated", hub_token=TOKEN)
        assert {part.role for part in tuned.components if not part.held} == {"unet"}
