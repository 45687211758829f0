"""The file of tokens: what is in it, what may not be, and what happens when it changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from denoised_server import tokens
from denoised_server.callers import Quota, Scope
from denoised_server.tokens import Token, TokenFile, TokenFileError

DIGEST = tokens.digest("secret")
ALICE = Token("alice", frozenset({Scope.LOAD}), DIGEST, quota=Quota(running=2))
ROBOT = Token("robot", frozenset(Scope), certificate="robot.example")


def test_what_is_written_is_read_again_and_only_its_owner_may(tmp_path: Path) -> None:
    path = tmp_path / "tokens.json"
    tokens.write(path, [ALICE, ROBOT])
    assert tokens.read(path) == [ALICE, ROBOT]
    assert path.stat().st_mode & 0o777 == 0o600
    assert [each.name for each in tmp_path.iterdir()] == ["tokens.json"]


def test_secrets_cannot_be_guessed_and_are_not_in_the_file(tmp_path: Path) -> None:
    secrets = {tokens.new_secret() for _ in range(100)}
    assert len(secrets) == 100
    assert min(map(len, secrets)) >= 43
    secret = secrets.pop()
    tokens.write(tmp_path / "tokens.json", [Token("bob", frozenset(Scope), tokens.digest(secret))])
    assert secret not in (tmp_path / "tokens.json").read_text()
    assert tokens.find(tokens.read(tmp_path / "tokens.json"), secret) is not None


@pytest.mark.parametrize(
    "entry",
    [
        {"scopes": ["load"], "sha256": DIGEST},
        {"name": "a b", "scopes": ["load"], "sha256": DIGEST},
        {"name": 7, "scopes": ["load"], "sha256": DIGEST},
        {"name": "a", "scopes": ["fly"], "sha256": DIGEST},
        {"name": "a", "scopes": ["load"]},
        {"name": "a", "scopes": ["load"], "sha256": "secret"},
        {"name": "a", "scopes": ["load"], "sha256": DIGEST, "secret": "secret"},
        {"name": "a", "scopes": ["load"], "sha256": DIGEST, "quota": {"speed": 1}},
        {"name": "a", "scopes": ["load"], "sha256": DIGEST, "quota": {"running": -1}},
        {"name": "a", "scopes": ["load"], "sha256": DIGEST, "quota": {"running": True}},
        "alice",
    ],
)
def test_an_entry_that_does_not_say_what_it_means_is_refused(tmp_path: Path, entry: Any) -> None:
    path = tmp_path / "tokens.json"
    path.write_text(json.dumps({"tokens": [entry]}))
    with pytest.raises(TokenFileError):
        tokens.read(path)


@pytest.mark.parametrize("text", ["", "[]", "{}", "nonsense", '{"tokens": 7}'])
def test_a_file_of_something_else_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "tokens.json"
    path.write_text(text)
    with pytest.raises(TokenFileError):
        tokens.read(path)


def test_names_digests_and_certificates_are_there_once(tmp_path: Path) -> None:
    path = tmp_path / "tokens.json"
    for pair in (
        [ALICE, Token("alice", frozenset(), tokens.digest("other"))],
        [ALICE, Token("bob", frozenset(), DIGEST)],
        [ROBOT, Token("bob", frozenset(), certificate="robot.example")],
    ):
        tokens.write(path, pair)
        with pytest.raises(TokenFileError):
            tokens.read(path)


def test_a_change_of_the_file_is_seen_and_a_broken_one_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "tokens.json"
    tokens.write(path, [ALICE])
    file = TokenFile(path)
    assert file.tokens() == [ALICE]
    tokens.write(path, [ALICE, ROBOT])
    assert file.tokens() == [ALICE, ROBOT]
    path.write_text("half a fi")
    assert file.tokens() == [ALICE, ROBOT]
    path.unlink()
    assert file.tokens() == [ALICE, ROBOT]
    tokens.write(path, [])
    assert file.tokens() == []
