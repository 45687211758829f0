"""What is written down of what callers do, and what never is."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from denoised import errors
from denoised_server import tokens
from denoised_server.callers import Scope
from denoised_server.tokens import Token

from tests.daemon import Daemon

PROMPT = "a wombat with a secret " + "very " * 100 + "long"
USUAL = frozenset(Scope) - {Scope.ADMIN}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def everything_written(folder: Path) -> str:
    """Every file under the state directory, as text, and the journal's rows."""
    found = []
    for path in folder.rglob("*"):
        if path.is_file():
            found.append(path.read_bytes().decode(errors="replace"))
        if path.suffix == ".sqlite3":
            with sqlite3.connect(path) as connection:
                found.extend(connection.iterdump())
            connection.close()
    return "\n".join(found)


def test_the_audit_log_has_who_did_what_and_no_secret_or_prompt(
    tmp_path: Path, sd_checkpoint: Path, checkpoint_dir: Path
) -> None:
    file, audit, state = tmp_path / "tokens.json", tmp_path / "audit.jsonl", tmp_path / "state"
    known = [Token(name, USUAL, tokens.digest(f"secret-of-{name}")) for name in ("alice", "bob")]
    tokens.write(file, known)
    options = ("--tokens-file", str(file))
    with Daemon(state, *options, allow=[checkpoint_dir], DENOISED_AUDIT_FILE=str(audit)) as running:
        with running.client(token="secret-of-alice") as alice, running.client(token="secret-of-bob") as bob:
            pipe = alice.load(sd_checkpoint, task="text-to-image", pipeline_id="hers")
            derived = alice.derive(pipe, "image-to-image")
            pipe(PROMPT, num_inference_steps=1, height=64, width=64)
            with pytest.raises(errors.InvalidRequestError):
                pipe(PROMPT, num_inference_steps=0)
            with pytest.raises(errors.SourceNotAllowedError):
                bob.load("/etc")
            with pytest.raises(errors.PipelineNotFoundError) as hidden:
                bob.unload("hers")
            alice.unload(derived.name)
            tokens.write(file, known[:1])
            with pytest.raises(errors.UnauthenticatedError):
                bob.server_info()
        metrics = str(running.metrics())
    found = [(line["event"], line.get("client"), line.get("outcome")) for line in lines(audit)]
    assert found == [
        ("LoadPipeline", "alice", "ok"),
        ("DerivePipeline", "alice", "ok"),
        ("LoadPipeline", "bob", "source_not_allowed"),
        ("UnloadPipeline", "bob", "pipeline_not_found"),
        ("UnloadPipeline", "alice", "ok"),
        ("tokens", None, None),
        ("GetServerInfo", None, "unauthenticated"),
    ]
    assert (lines(audit)[0]["pipeline"], lines(audit)[0]["repo_id"]) == ("pipelines/hers", str(sd_checkpoint))
    assert lines(audit)[1]["source"] == "pipelines/hers"
    assert lines(audit)[5]["went"] == ["bob"]
    assert audit.stat().st_mode & 0o077 == 0
    assert "alice" not in str(hidden.value)
    written = {"log": "".join(running.log), "audit": audit.read_text(), "metrics": metrics}
    for place, text in (written | {"state": everything_written(state)}).items():
        assert "wombat" not in text, place
        assert "secret-of" not in text, place


def test_prompts_are_written_down_where_a_setting_says_so(
    tmp_path: Path, sd_checkpoint: Path, checkpoint_dir: Path
) -> None:
    audit = tmp_path / "audit.jsonl"
    variables: dict[str, Any] = {"DENOISED_AUDIT_FILE": str(audit), "DENOISED_AUDIT_PROMPTS": "true"}
    with Daemon(tmp_path / "state", allow=[checkpoint_dir], **variables) as running, running.client() as client:
        pipe = client.load(sd_checkpoint, task="text-to-image")
        pipe("a wombat", num_inference_steps=1, height=64, width=64)
    (generation,) = [line for line in lines(audit) if line["event"] == "Generate"]
    assert (generation["prompt"], generation["pipeline"]) == ("a wombat", pipe.name)
    assert "wombat" not in "".join(running.log)
