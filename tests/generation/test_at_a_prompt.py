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


def test_verbose_prints_the_text_and_what_it_took(capsys: pytest.CaptureFixture[str]) -> None:
    """As mlx-lm's generate is called in its README."""
    model, tokenizer = bitnet_mlx.load(backend="numpy")
    quiet = bitnet_mlx.generate(model, tokenizer, prompt="def f(x):", max_tokens=5)
    assert capsys.readouterr().out == ""
    assert bitnet_mlx.generate(model, tokenizer, prompt="def f(x):", max_tokens=5, verbose=True) == quiet
    text, numbers = capsys.readouterr().out[:-1].rsplit("\n", 1)
    assert text == quiet
    assert numbers.startswith(f"prompt {len(tokenizer.encode('def f(x):'))} tokens at ")
    assert "generated 5 at " in numbers and numbers.endswith("(length)")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"temp": 0.5, "top_p": 0.9}, r"no option temp, top_p; sampling=.*SamplingConfig\(temp=..., top_p=...\)"),
        ({"sampler": None}, r"no option sampler; sampling=.*SamplingConfig\(temp=...\)"),
        ({"max_token": 3}, r"no option max_token; help\(bitnet_mlx.stream_generate\)"),
    ],
)
def test_options_of_other_names(options: dict[str, Any], told: str) -> None:
    model, tokenizer = bitnet_mlx.load(backend="numpy")
    with pytest.raises(ConfigError, match=told):
        bitnet_mlx.generate(model, tokenizer, "x", **options)


def test_what_is_told_instead_can_be_said() -> None:
    model, tokenizer = bitnet_mlx.load(backend="numpy")
    sampling = bitnet_mlx.generation.SamplingConfig(temp=0.5, seed=1)
    assert bitnet_mlx.generate(model, tokenizer, "x", max_tokens=2, sampling=sampling)
