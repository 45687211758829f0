"""What may be loaded, by rules and by a real worker that keeps to them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from denoised.errors import RepoNotFoundError, SourceNotAllowedError
from denoised_server.messages import Adapter, AdapterSource, ComponentSource
from denoised_server.worker.source_rules import SourceRules
from safetensors.torch import load_file

from tests import checkpoints
from tests.unit.worker_driver import Driver

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CODE = "import pathlib; pathlib.Path({marker!r}).write_text('ran')\nclass Own:\n    from_pretrained = print\n"


def rules(**settings: Any) -> SourceRules:
    return SourceRules((Path("/models"),), Path("/cache"), **settings)


@pytest.mark.parametrize(
    ("patterns", "repo_id", "allowed"),
    [
        ((), "anybody/anything", True),
        (("org/*",), "org/model", True),
        (("org/*",), "organ/model", False),
        (("org/*",), "ORG/model", False),
        (("org/model",), "org/model", True),
        (("org/model",), "org/model2", False),
        (("org/*", "other/one"), "other/one", True),
        (("org/*",), "gpt2", False),
    ],
)
def test_repositories_are_allowed_by_name_or_organisation(
    patterns: tuple[str, ...], repo_id: str, allowed: bool
) -> None:
    if allowed:
        rules(repos=patterns).check_repo(repo_id, "")
    else:
        with pytest.raises(SourceNotAllowedError):
            rules(repos=patterns).check_repo(repo_id, "")


@pytest.mark.parametrize("revision", ["", "main", "v1.0", COMMIT[:39], COMMIT.upper(), COMMIT + "0"])
def test_pinned_revisions_are_commits_and_nothing_else(revision: str) -> None:
    rules(pinned=True).check_repo("org/model", COMMIT)
    with pytest.raises(SourceNotAllowedError, match="commit"):
        rules(pinned=True).check_repo("org/model", revision)


def test_the_cache_may_be_linked_to_and_not_named_where_repositories_have_rules() -> None:
    blob = Path("/cache/models--org--model/snapshots/x")
    rules().check_named(blob, "it")
    rules(repos=("other/*",)).check_link(blob, "it")
    for strict in (rules(repos=("other/*",)), rules(pinned=True)):
        with pytest.raises(SourceNotAllowedError):
            strict.check_named(blob, "it")
    rules(pinned=True).check_named(Path("/models/a"), "it")


@pytest.fixture
def driver(checkpoint_dir: Path, tmp_path: Path) -> Iterator[Driver]:
    driver = Driver(checkpoint_dir, tmp_path)
    yield driver
    driver.close()


def with_entry(folder: Path, role: str, entry: list[str]) -> Path:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {role: entry}))
    return folder


@pytest.mark.parametrize("library", ["own", "unet.own", "os", "subprocess", "tests.checkpoints", "torch.hub"])
def test_code_that_a_checkpoint_brings_or_names_is_never_run(driver: Driver, tmp_path: Path, library: str) -> None:
    folder, marker = checkpoints.stable_diffusion(tmp_path / "sd"), tmp_path / "marker"
    for path in (folder / "own.py", folder / "unet" / "own.py", folder / "pipeline.py"):
        path.write_text(CODE.format(marker=str(marker)))
    with_entry(folder, "unet", [library, "Own"])
    with pytest.raises(SourceNotAllowedError, match="code"):
        driver.load("pipelines/a", folder)
    assert not marker.exists()


def test_code_that_a_configuration_names_is_not_run_either(driver: Driver, tmp_path: Path) -> None:
    folder, marker = checkpoints.stable_diffusion(tmp_path / "sd"), tmp_path / "marker"
    for part, config in (
        ("text_encoder", "config.json"),
        ("unet", "config.json"),
        ("tokenizer", "tokenizer_config.json"),
    ):
        path = folder / part / config
        named = {"auto_map": dict.fromkeys(("AutoConfig", "AutoModel", "AutoTokenizer"), "own.Own")}
        path.write_text(json.dumps(json.loads(path.read_text()) | named))
        (folder / part / "own.py").write_text(CODE.format(marker=str(marker)))
    driver.load("pipelines/a", folder)
    assert not marker.exists()


def pickled(folder: Path) -> Path:
    """The checkpoint with its UNet's weights in a pickled file only."""
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), folder / "unet" / "diffusion_pytorch_model.bin")
    weights.unlink()
    return folder


def test_pickled_weights_are_not_read_unless_a_setting_says_so(driver: Driver, tmp_path: Path) -> None:
    folder = pickled(checkpoints.stable_diffusion(tmp_path / "sd"))
    with pytest.raises(SourceNotAllowedError, match="pickled"):
        driver.load("pipelines/a", folder)
    with pytest.raises(SourceNotAllowedError, match="safetensors files only"):
        driver.load("pipelines/a", folder, use_safetensors=False)
    trusting = Driver(tmp_path, allow_pickle=True)
    trusting.load("pipelines/a", folder)
    trusting.close()


def test_a_component_from_elsewhere_keeps_to_the_same_rules(
    driver: Driver, sd_checkpoint: Path, tmp_path: Path
) -> None:
    other = pickled(checkpoints.stable_diffusion(tmp_path / "other"))
    for source in (ComponentSource(str(other), "unet"), ComponentSource("/etc", "")):
        with pytest.raises(SourceNotAllowedError):
            driver.load("pipelines/a", sd_checkpoint, overrides={"unet": source})


def test_what_the_hub_may_not_give_is_not_asked_of_it(tmp_path: Path, sd_checkpoint: Path) -> None:
    strict = Driver(sd_checkpoint.parent, allow_repos=("org/*",))
    try:
        with pytest.raises(SourceNotAllowedError, match="nobody/nothing"):
            strict.load("pipelines/a", "nobody/nothing")
        with pytest.raises(SourceNotAllowedError, match="nobody/vae"):
            strict.load("pipelines/a", sd_checkpoint, overrides={"vae": ComponentSource("nobody/vae")})
        strict.load("pipelines/b", sd_checkpoint)
        adapter = Adapter(source=AdapterSource("nobody/lora"))
        with pytest.raises(SourceNotAllowedError, match="nobody/lora"):
            strict.generate("pipelines/b", adapters=(adapter,), prompt="a cat").result()
        # Allowed, and not there: the Hub cannot be reached from here.
        with pytest.raises(RepoNotFoundError):
            strict.load("pipelines/c", "org/model")
    finally:
        strict.close()


def test_a_readme_names_only_what_may_be_loaded(sd_checkpoint: Path, tmp_path: Path) -> None:
    folder = checkpoints.stable_diffusion(tmp_path / "sd")
    (folder / "README.md").write_text("---\nprior:\n- nobody/prior\n---\n")
    strict = Driver(tmp_path, allow_repos=("org/*",))
    with pytest.raises(SourceNotAllowedError, match="nobody/prior"):
        strict.load("pipelines/a", folder)
    strict.close()


@pytest.mark.parametrize("name", ["trust_remote_code", "vocab_file", "cache_dir", "subfolder", "some_path"])
def test_options_that_say_what_to_read_are_not_the_callers(
    driver: Driver, sd_checkpoint: Path, tmp_path: Path, name: str
) -> None:
    folder, marker = checkpoints.stable_diffusion(tmp_path / "sd") / "tokenizer", tmp_path / "marker"
    config = json.loads((folder / "tokenizer_config.json").read_text()) | {
        "auto_map": {"AutoTokenizer": ["own.Own", None]}
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "Own"}))
    (folder / "own.py").write_text(CODE.format(marker=str(marker)))
    source = ComponentSource(str(folder), class_name="AutoTokenizer", config={name: True})
    with pytest.raises(SourceNotAllowedError, match=name):
        driver.load("pipelines/a", sd_checkpoint, overrides={"tokenizer": source})
    assert not marker.exists()
