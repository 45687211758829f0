from __future__ import annotations

from dataclasses import replace

import pytest
from denoised.errors import InvalidFieldError, PipelineNotFoundError
from denoised_server.messages import ComponentSource, Derivation, NoiseScheduler, PipelineSettings, Recipe, Spec
from denoised_server.recipes import identity, shares_weights
from denoised_server.references import Origin, resolve

ONE, OTHER = ComponentSource("nets/one"), ComponentSource("nets/other", dtype="float32")
SPEC = Spec("owner/name", revision="c0ffee", variant="fp16", dtype="float16", overrides={"vae": ONE, "unet": None})
RECIPE = Recipe(SPEC, (Derivation("inpainting", {"controlnet": (ONE, OTHER)}), Derivation("inpainting", {"eta": 1})))
ROLES = ("vae", "text_encoder", "controlnet", "controlnet[0]", "controlnet[1]", "unet")


def find(pipeline: str) -> Origin:
    if pipeline != "pipelines/a":
        raise PipelineNotFoundError(f"There is no {pipeline}.")
    return Origin(RECIPE, ROLES)


def live(role: str, pipeline: str = "pipelines/a") -> ComponentSource:
    return ComponentSource(pipeline=pipeline, role=role)


SOURCES = {
    "text_encoder": ComponentSource("owner/name", "text_encoder", revision="c0ffee", variant="fp16", dtype="float16"),
    "vae": replace(ONE, dtype="float16"),
    "controlnet": (replace(ONE, dtype="float16"), OTHER),
    "controlnet[1]": OTHER,
}


@pytest.mark.parametrize("role", SOURCES)
def test_a_part_of_a_live_pipeline_is_where_it_came_from(role: str) -> None:
    assert resolve(Spec("x", overrides={"role": live(role)}), find, "spec").overrides == {"role": SOURCES[role]}


def test_a_noise_scheduler_that_was_set_is_what_it_was_set_to() -> None:
    settings = PipelineSettings(NoiseScheduler("DDIMScheduler", {"eta": 1.0}))
    recipe = Recipe(SPEC, settings=settings)
    spec = resolve(Spec("x", overrides={"scheduler": live("scheduler")}), lambda name: Origin(recipe, ()), "spec")
    assert spec.overrides == {"scheduler": ComponentSource(class_name="DDIMScheduler", config={"eta": 1.0})}


def test_parts_in_a_list_are_resolved_each() -> None:
    spec = resolve(Spec("x", overrides={"nets": (live("controlnet"), ONE, live("vae"))}), find, "spec")
    assert spec.overrides["nets"] == (replace(ONE, dtype="float16"), OTHER, ONE, replace(ONE, dtype="float16"))


def test_what_names_no_pipeline_is_left_alone() -> None:
    spec = Spec("x", overrides={"a": None, "b": ONE, "c": (ONE, OTHER), "d": ["mid"]})
    assert resolve(spec, find, "spec") is spec


def test_a_part_that_is_not_there_gets_a_suggestion() -> None:
    with pytest.raises(InvalidFieldError, match="Did you mean 'text_encoder'") as caught:
        resolve(Derivation("inpainting", {"role": live("text_encodr")}), find, "derivation")
    assert caught.value.metadata["field"] == "derivation.overrides[role].role"
    with pytest.raises(InvalidFieldError, match="made without"):
        resolve(Spec("x", overrides={"unet": live("unet")}), find, "spec")
    with pytest.raises(PipelineNotFoundError):
        resolve(Spec("x", overrides={"vae": live("vae", "pipelines/gone")}), find, "spec")


def test_recipes_with_components_have_an_identity() -> None:
    recipes = [
        Recipe(Spec("x", overrides=overrides))
        for overrides in (
            {"vae": ONE},
            {"vae": (ONE,)},
            {"vae": OTHER},
            {"vae": replace(ONE, config={"a": True})},
            {"vae": replace(ONE, config={"a": 1})},
        )
    ]
    assert len({identity(recipe) for recipe in recipes}) == len(recipes)


def test_single_files_and_what_describes_them_are_part_of_an_identity() -> None:
    specs = [Spec("x"), Spec("x", single_file="a.safetensors"), Spec("x", single_file="b.safetensors")]
    specs.append(Spec("x", single_file="a.safetensors", config_source=ComponentSource("y")))
    assert len({identity(Recipe(each)) for each in specs}) == len(specs)


def test_a_part_of_a_single_file_is_not_taken_from_a_folder_that_is_not_there() -> None:
    origin = Origin(Recipe(Spec("x", single_file="a.safetensors")), ("unet",))
    with pytest.raises(InvalidFieldError, match="single file") as caught:
        resolve(Spec("y", overrides={"unet": live("unet")}), lambda name: origin, "spec")
    assert caught.value.metadata["field"] == "spec.overrides[unet].role"


def test_a_component_of_another_checkpoint_is_looked_for_where_that_one_is() -> None:
    checkpoint = Recipe(Spec("owner/name", dtype="float16"))
    assert shares_weights(
        Recipe(Spec("x", dtype="float16", overrides={"vae": ComponentSource("owner/name")})), checkpoint
    )
    assert not shares_weights(Recipe(Spec("x", overrides={"vae": ComponentSource("owner/name")})), checkpoint)
    assert not shares_weights(Recipe(Spec("x", overrides={"vae": None})), checkpoint)
