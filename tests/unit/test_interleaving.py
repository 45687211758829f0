"""Requests that change shared components, run between each other's calls, come out as if they were alone (FACTS C).

The reference is the same request run when nothing else runs, which the parity suite shows equal to diffusers.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from denoised_server.messages import Finished
from peft import LoraConfig

from tests.unit.worker_driver import Driver, finished, images

SIZE: dict[str, Any] = {"height": 64, "width": 64}


@pytest.fixture
def driver(checkpoint_dir: Path) -> Iterator[Driver]:
    driver = Driver(checkpoint_dir)
    yield driver
    driver.close()


def alone_and_together(
    driver: Driver, requests: list[tuple[str, dict[str, Any]]], **options: Any
) -> tuple[list[Any], list[Any], list[Finished]]:
    """Outputs of the requests one after another and all at once, and what each cost together."""
    alone = [images(driver.generate(name, **options, **request).result()) for name, request in requests]
    running = [driver.generate(name, **options, **request) for name, request in requests]
    together = [each.result() for each in running]
    return alone, [images(events) for events in together], [finished(events) for events in together]


def request(index: int, **more: Any) -> dict[str, Any]:
    return {"prompt": f"a cat {index}", "seed": index, "num_inference_steps": 6 + index, **SIZE, **more}


def test_pag_beside_plain_requests_on_one_unet(driver: Driver, sd_checkpoint: Path) -> None:
    driver.load("pipelines/plain", sd_checkpoint)
    driver.load("pipelines/pag", sd_checkpoint, overrides={"enable_pag": True, "pag_applied_layers": ["mid"]})
    assert len(driver.snapshot().components) == 3, "one UNet, VAE and text encoder for both"
    requests = [
        ("pipelines/plain", request(0)),
        ("pipelines/pag", request(1, pag_scale=3.0)),
        ("pipelines/pag", request(2, pag_scale=5.0)),
        ("pipelines/plain", request(3)),
    ]
    alone, together, costs = alone_and_together(driver, requests)
    for expected, actual in zip(alone, together, strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-4)
    assert costs[0].joined_calls, "plain requests still join each other"
    assert costs[3].joined_calls
    assert not np.allclose(alone[1], images(driver.generate("pipelines/plain", **request(1)).result()), atol=1e-3)


def test_forbidden_pag_and_plain_requests_are_bit_identical(driver: Driver, sd_checkpoint: Path) -> None:
    driver.load("pipelines/plain", sd_checkpoint)
    driver.load("pipelines/pag", sd_checkpoint, overrides={"enable_pag": True, "pag_applied_layers": ["mid"]})
    requests = [("pipelines/plain", request(0)), ("pipelines/pag", request(1, pag_scale=3.0))]
    alone, together, _ = alone_and_together(driver, requests, forbid=True)
    for expected, actual in zip(alone, together, strict=True):
        np.testing.assert_array_equal(actual, expected)


def test_a_pag_request_cancelled_half_way_leaves_the_unet_as_it_was(driver: Driver, sd_checkpoint: Path) -> None:
    driver.load("pipelines/plain", sd_checkpoint)
    driver.load("pipelines/pag", sd_checkpoint, overrides={"enable_pag": True, "pag_applied_layers": ["mid"]})
    before = images(driver.generate("pipelines/plain", **request(0)).result())
    running = driver.generate("pipelines/pag", **request(1, num_inference_steps=500))
    running.next()
    running.cancel()
    running.result()
    np.testing.assert_array_equal(images(driver.generate("pipelines/plain", **request(0)).result()), before)


def test_sdxl_casts_of_a_half_precision_vae(driver: Driver, sdxl_checkpoint: Path) -> None:
    driver.load("pipelines/xl", sdxl_checkpoint, dtype="float16")
    # The same length, so that both come to their casts in the same moments.
    requests = [("pipelines/xl", request(index, num_inference_steps=4)) for index in range(4)]
    alone, together, _ = alone_and_together(driver, requests, forbid=True)
    for expected, actual in zip(alone, together, strict=True):
        assert np.isfinite(expected).all()
        np.testing.assert_array_equal(actual, expected)
    vae = driver.worker._pipelines["pipelines/xl"].pipeline.vae
    assert {parameter.dtype for parameter in vae.parameters()} == {torch.float16}


def test_lora_scales_on_the_text_encoder(driver: Driver, sd_checkpoint: Path) -> None:
    driver.load("pipelines/lora", sd_checkpoint)
    pipeline = driver.worker._pipelines["pipelines/lora"].pipeline
    torch.manual_seed(0)
    for module, targets in ((pipeline.text_encoder, ["q_proj"]), (pipeline.unet, ["to_q"])):
        module.add_adapter(LoraConfig(r=4, target_modules=targets, init_lora_weights="gaussian"))
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.5)
    requests = [
        ("pipelines/lora", request(0, prompt="a cat", num_inference_steps=4, cross_attention_kwargs={"scale": scale}))
        for scale in (0.0, 0.3, 0.7, 2.0)
    ]
    alone, together, _ = alone_and_together(driver, requests)
    for expected, actual in zip(alone, together, strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-4)
    assert not np.allclose(alone[0], alone[3], atol=1e-3), "the scale matters"


def test_a_component_that_runs_inline_keeps_what_it_sets_on_itself(driver: Driver, sdxl_checkpoint: Path) -> None:
    """transformers installs hooks at the first call and remembers so on the module: one without the other is wrong."""
    driver.load("pipelines/xl", sdxl_checkpoint)
    live = driver.worker._pipelines["pipelines/xl"]
    plain = type(live.pipeline)

    class Casting(plain):  # type: ignore[misc,valid-type]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return super().__call__(*args, **kwargs)

    live.pipeline.__class__ = Casting
    driver.generate("pipelines/xl", **request(0)).result()
    live.pipeline.__class__ = plain
    after = images(driver.generate("pipelines/xl", **request(0)).result())
    fresh = Driver(sdxl_checkpoint)
    fresh.load("pipelines/xl", sdxl_checkpoint)
    np.testing.assert_array_equal(after, images(fresh.generate("pipelines/xl", **request(0)).result()))
    fresh.close()


def test_autocast_around_a_call_reaches_no_other_request(driver: Driver, sd_checkpoint: Path) -> None:
    driver.load("pipelines/plain", sd_checkpoint)
    driver.load("pipelines/cast", sd_checkpoint)
    live = driver.worker._pipelines["pipelines/cast"]

    class Casting(type(live.pipeline)):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return super().__call__(*args, **kwargs)

    live.pipeline.__class__ = Casting
    requests = [("pipelines/plain", request(0)), ("pipelines/cast", request(1)), ("pipelines/plain", request(2))]
    alone, together, costs = alone_and_together(driver, requests)
    for index in (0, 2):
        np.testing.assert_allclose(together[index], alone[index], atol=1e-4)
    np.testing.assert_array_equal(together[1], alone[1])
    assert costs[1].calls == 0, "under a mode, calls do not yield"
