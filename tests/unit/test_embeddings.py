"""What text encoders came to is kept for a while, and what is found is what computing it would give."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from denoised_server.worker.embeddings import Embeddings
from denoised_server.worker.seam import Method
from peft import LoraConfig
from transformers import CLIPTextConfig, CLIPTextModel

from tests.memory_limit import MIB, limited
from tests.unit.worker_driver import Driver, images

SIZE: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 2}


def encoder() -> Method:
    module = CLIPTextModel(
        CLIPTextConfig(hidden_size=8, intermediate_size=8, num_attention_heads=2, num_hidden_layers=1)
    )
    return Method(module, "forward", module.forward, [])


def keep(embeddings: Embeddings, method: Method, tokens: list[int], size: int = 4, now: float = 0.0) -> Any:
    key = embeddings.key(method, (torch.tensor([tokens]),), {"return_dict": True})
    embeddings.keep(key, method, (torch.full((1, size), float(tokens[0])), None), now)
    return key


def test_the_same_tokens_are_found_until_their_time_is_over() -> None:
    embeddings, method = Embeddings(1000, 10.0), encoder()
    key = keep(embeddings, method, [1, 2])
    assert key == embeddings.key(method, (torch.tensor([[1, 2]]),), {"return_dict": True})
    assert embeddings.find(key, method, 9.9) is not None
    for other in ([[1, 3]], [[1], [2]]):
        assert embeddings.find(embeddings.key(method, (torch.tensor(other),), {"return_dict": True}), method, 0) is None
    assert embeddings.find(embeddings.key(method, (torch.tensor([[1, 2]]),), {}), method, 0) is None
    assert embeddings.find(key, encoder(), 1.0) is None, "another component"
    keep(embeddings, method, [1, 2])
    assert embeddings.find(key, method, 10.0) is None
    assert embeddings.size_bytes == 0


def test_where_there_is_no_memory_to_keep_or_to_give_anything_all_of_it_is_let_go_of() -> None:
    embeddings, method = Embeddings(1 << 30, 10.0), encoder()
    small, large = (torch.tensor([[number]]) for number in (1, 2))
    keys = [embeddings.key(method, (tokens,), {}) for tokens in (small, large)]
    value = torch.ones(64 * MIB, dtype=torch.uint8)
    embeddings.keep(keys[0], method, torch.ones(4), 0.0)
    with limited(16 * MIB):
        embeddings.keep(keys[1], method, value, 0.0)
    assert embeddings.size_bytes == 0
    assert [embeddings.find(key, method, 0.0) for key in keys] == [None, None]
    embeddings.keep(keys[1], method, value, 0.0)
    with limited(16 * MIB):
        assert embeddings.find(keys[1], method, 0.0) is None
    assert embeddings.size_bytes == 0


def test_bytes_are_bounded_and_those_not_found_for_longest_go_first() -> None:
    embeddings, method = Embeddings(64, 10.0), encoder()
    keys = [keep(embeddings, method, [index]) for index in range(4)]
    assert embeddings.size_bytes == 64
    embeddings.find(keys[0], method, 0)
    keys.append(keep(embeddings, method, [4]))
    assert embeddings.size_bytes == 64
    assert [embeddings.find(key, method, 0) is not None for key in keys] == [True, False, True, True, True]
    too_large = keep(embeddings, method, [5], size=8)
    assert embeddings.find(too_large, method, 0) is None


def test_what_is_found_is_the_finders_own() -> None:
    embeddings, method = Embeddings(1000, 10.0), encoder()
    key = keep(embeddings, method, [7])
    for _ in range(2):
        found = embeddings.find(key, method, 0)
        assert found is not None
        assert found.value[0].tolist() == [[7.0] * 4]
        found.value[0].zero_()


def test_only_text_encoders_and_only_small_plain_arguments() -> None:
    embeddings, method = Embeddings(1000, 10.0), encoder()
    assert embeddings.key(method, (torch.zeros(1 << 20),), {}) is None
    assert embeddings.key(method, (torch.zeros(1), object()), {}) is None
    assert embeddings.key(method, (), {}) is None
    unet = Method(torch.nn.Linear(1, 1), "forward", torch.nn.Linear(1, 1).forward, [])
    assert embeddings.key(unet, (torch.zeros(1),), {}) is None
    assert Embeddings(0, 10.0).key(method, (torch.zeros(1),), {}) is None
    assert Embeddings(1000, 0).key(method, (torch.zeros(1),), {}) is None


@pytest.fixture
def driver(checkpoint_dir: Path, sd_checkpoint: Path) -> Iterator[Driver]:
    driver = Driver(checkpoint_dir)
    driver.load("pipelines/a", sd_checkpoint)
    yield driver
    driver.close()


def test_a_prompt_asked_again_gives_the_same_bits(driver: Driver) -> None:
    def run(seed: int, **more: Any) -> Any:
        return images(driver.generate("pipelines/a", prompt="a cat", seed=seed, **SIZE, **more).result())

    first = run(0)
    assert driver.snapshot().embedding_hits == 0
    assert driver.snapshot().embedding_bytes > 0
    again = run(0)
    assert driver.snapshot().embedding_hits == 2, "the prompt, and the empty one of guidance"
    computed = run(0, forbid=True)
    assert driver.snapshot().embedding_hits == 2
    np.testing.assert_array_equal(first, computed)
    np.testing.assert_array_equal(again, computed)
    np.testing.assert_array_equal(run(1), run(1, forbid=True))


def test_a_changed_encoder_is_not_taken_for_the_same(driver: Driver) -> None:
    encoder: Any = driver.worker._pipelines["pipelines/a"].pipeline.text_encoder
    encoder.add_adapter(LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="gaussian"))
    for name, parameter in encoder.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)

    def run(scale: float, **more: Any) -> Any:
        kwargs = {"scale": scale}
        return images(
            driver.generate("pipelines/a", prompt="a cat", cross_attention_kwargs=kwargs, **SIZE, **more).result()
        )

    for scale in (1.0, 0.25, 1.0, 0.25):
        np.testing.assert_array_equal(run(scale), run(scale, forbid=True))
