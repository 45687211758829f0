"""Who gets in, and to what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
from denoised.errors import ScopeMissingError, UnauthenticatedError
from denoised_server import tokens
from denoised_server.access import SCOPES, Access
from denoised_server.callers import DAEMON, Scope
from denoised_server.services import METHODS, SERVICES
from denoised_server.tokens import Token
from google.protobuf import descriptor_pool

EVERYTHING = {
    f"/{service}/{method.name}"
    for service in SERVICES
    for method in descriptor_pool.Default().FindServiceByName(service).methods
}
ALICE = Token("alice", frozenset({Scope.LOAD, Scope.READ}), digest=tokens.digest("a secret"))
ROOT = Token("root", frozenset({Scope.ADMIN}), digest=tokens.digest("another"))
ROBOT = Token("robot", frozenset({Scope.GENERATE}), certificate="robot.example")
GENERATE = "/denoised.v1.GenerationService/Generate"
LOAD = "/denoised.v1.PipelineService/LoadPipeline"


def access() -> Access:
    return Access(lambda: [ALICE, ROOT, ROBOT])


def bearer(secret: str) -> Sequence[tuple[str, str]]:
    return [("user-agent", "test"), ("authorization", f"Bearer {secret}")]


def certificate(name: str) -> Mapping[str, Sequence[bytes]]:
    return {"x509_common_name": [name.encode()]}


def test_every_method_has_a_scope_and_every_scope_a_method() -> None:
    """Who adds a method says here who may call it; until then only an admin may."""
    assert set(SCOPES) == EVERYTHING
    assert len(EVERYTHING) == len(METHODS)


def test_without_tokens_everybody_may_do_everything() -> None:
    assert all(Access().admit(method, [], {}) is DAEMON for method in EVERYTHING)


@pytest.mark.parametrize("method", sorted(EVERYTHING))
def test_a_scope_opens_the_methods_that_it_names_and_admin_opens_all(method: str) -> None:
    assert access().admit(method, bearer("another"), {}).name == "root"
    if SCOPES[method] in ALICE.scopes:
        assert access().admit(method, bearer("a secret"), {}).name == "alice"
    else:
        with pytest.raises(ScopeMissingError) as refused:
            access().admit(method, bearer("a secret"), {})
        assert refused.value.metadata == {"scope": SCOPES[method]}


def test_a_method_that_is_not_listed_is_for_admins() -> None:
    assert access().admit("/denoised.v1.New/Thing", bearer("another"), {}).is_admin
    with pytest.raises(ScopeMissingError):
        access().admit("/denoised.v1.New/Thing", bearer("a secret"), {})


@pytest.mark.parametrize(
    "metadata",
    [
        [],
        [("authorization", "")],
        [("authorization", "Bearer ")],
        [("authorization", "a secret")],
        [("authorization", "Basic a secret")],
        [("authorization", "Bearer A SECRET")],
        [("authorization", "Bearer a secre")],
        [("authorization", b"Bearer a secret")],
        [*bearer("a secret"), *bearer("another")],
    ],
)
def test_whoever_shows_no_known_token_stays_outside(metadata: Sequence[tuple[str, str]]) -> None:
    with pytest.raises(UnauthenticatedError):
        access().admit(LOAD, metadata, {})


def test_the_word_bearer_may_be_written_as_one_likes() -> None:
    assert access().admit(LOAD, [("authorization", "bearer a secret")], {}).name == "alice"


def test_a_certificate_stands_for_the_token_that_names_it_and_for_no_other() -> None:
    assert access().admit(GENERATE, [], certificate("robot.example")).name == "robot"
    for name in ("alice", "robot", "", "\xff"):
        with pytest.raises(UnauthenticatedError):
            access().admit(GENERATE, [], certificate(name))


def test_a_token_that_is_shown_and_wrong_is_not_made_good_by_a_certificate() -> None:
    with pytest.raises(UnauthenticatedError):
        access().admit(GENERATE, bearer("wrong"), certificate("robot.example"))
