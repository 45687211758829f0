"""Messages as JSON and back."""

from __future__ import annotations

import json
from typing import Any

import pytest
from denoised.values import Artifact
from denoised_server import codec, messages
from denoised_server.messages import ComponentSource, Derivation, Generate, Loaded, Parameter, Recipe, Spec
from hypothesis import given
from hypothesis import strategies as st

RECIPE = Recipe(
    Spec("owner/name", dtype="float16", overrides={"vae": ComponentSource("other"), "safety_checker": None, "@": [1]}),
    (Derivation("inpainting", {"scale": 0.5}),),
)
PARAMETERS = (Parameter("prompt", kinds=frozenset({"str", "none"}), default=None, has_default=True),)
ARTIFACT = Artifact("image/png", b"\x00\xff", "uint8", (1, 2))

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text() | st.just("@"), inner),
)


@pytest.mark.parametrize(
    "value",
    [
        RECIPE,
        Loaded("text-to-image", "Fake", (messages.Component("unet", "Net", "sha", 7),), PARAMETERS),
        Generate("pipelines/a", {"image": ARTIFACT, "n": 3}, seeds=(2**63,), generators=(("cpu", b"state"),)),
        {"recipe": RECIPE, "ttl": 1.5},
    ],
)
def test_a_message_comes_back_as_it_was(value: object) -> None:
    assert codec.decode(codec.encode(value)) == value


@given(plain)
def test_every_plain_value_comes_back_with_its_types(value: Any) -> None:
    found = codec.decode(codec.encode(value))
    assert repr(found) == repr(value)


def test_a_field_that_was_not_there_yet_has_its_default_and_one_that_went_is_dropped() -> None:
    written = json.loads(codec.encode(Spec("owner/name", revision="main")))
    del written["revision"]
    written["of_the_past"] = 1
    assert codec.decode(json.dumps(written)) == Spec("owner/name")


def test_what_another_version_wrote_says_so() -> None:
    with pytest.raises(ValueError, match="another version"):
        codec.decode('{"@": "NoSuchMessage"}')
    with pytest.raises(ValueError, match="another version"):
        codec.decode('{"@": "Spec"}')


def test_what_is_no_message_is_not_kept() -> None:
    with pytest.raises(TypeError):
        codec.encode({"a": object()})
