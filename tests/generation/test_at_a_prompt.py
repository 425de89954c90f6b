"""What a person at a Python prompt or in a notebook sees: completions, short descriptions, errors of our own."""

from __future__ import annotations

from typing import Any

import pytest

import bitnet_mlx
from bitnet_mlx.errors import ConfigError


def test_completion_offers_the_public_names_alone() -> None:
    assert [name for name in dir(bitnet_mlx) if not name.startswith("__")] == sorted(bitnet_mlx.__all__)


@pytest.mark.parametrize("backend", ["numpy", "cpu"])
def test_a_model_and_a_tokenizer_describe_themselves(backend: str) -> None:
    model, tokenizer = bitnet_mlx.load(backend=backend)
    assert repr(model).endswith("Decoder(bitnet, 8 layers, 4.5 MB)")
    assert "3072 tokens, no chat template" in repr(tokenizer)


@pytest.mark.parametrize("prompt", [None, 5, ["a"], [1.5]])
def test_a_prompt_that_is_none(prompt: Any) -> None:
    model, tokenizer = bitnet_mlx.load(backend="numpy")
    with pytest.raises(ConfigError, match="a text or a list of token ids is needed"):
        bitnet_mlx.generate(model, tokenizer, prompt, max_tokens=1)
