"""The reader on the golden cases' folders: the arrays that their recipe says, bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bitnet_mlx.checkpoint.read import read_weights
from bitnet_mlx.formats.dense import DenseRows, GroupedRows
from bitnet_mlx.models.weights import Matrix
from bitnet_mlx.ternary import TernaryTensor
from tests.golden import by_hand, recipe
from tests.golden.cases import CASES

SHARED_CONFIG = (
    "model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    "head_dim rms_norm_eps max_position_embeddings hidden_act sub_norms tie_word_embeddings rope activation_bits"
).split()


def same_matrix(found: Matrix, expected: Matrix, name: str) -> None:
    if isinstance(expected, TernaryTensor):
        assert isinstance(found, TernaryTensor), name
        assert (found.shape, found.activation_bits) == (expected.shape, expected.activation_bits), name
        np.testing.assert_array_equal(found.words, expected.words, name)
        np.testing.assert_array_equal(found.scale, expected.scale, name)
        return
    assert isinstance(found, DenseRows) and not isinstance(found, GroupedRows), name
    np.testing.assert_array_equal(found.rows(slice(None)), expected.rows(slice(None)), name)


@pytest.mark.parametrize("name", CASES)
def test_every_tensor_as_the_recipe_made_it(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    recipe.write(case, tmp_path)
    found, expected = read_weights(tmp_path, activations=case.activation_bits), by_hand.weights(case)
    for key in SHARED_CONFIG:
        assert getattr(found.config, key) == getattr(expected.config, key), key
    same_matrix(found.embed_tokens, expected.embed_tokens, "model.embed_tokens")
    same_matrix(found.lm_head, expected.lm_head, "lm_head")
    assert (found.lm_head is found.embed_tokens) == case.config["tie_word_embeddings"]
    assert found.linears.keys() == expected.linears.keys() and found.norms.keys() == expected.norms.keys()
    for key, linear in expected.linears.items():
        same_matrix(found.linears[key].weight, linear.weight, key)
        bias = found.linears[key].bias
        assert (bias is None) == (linear.bias is None), key
        if bias is not None:
            np.testing.assert_array_equal(bias, linear.bias, key)
    for key, norm in expected.norms.items():
        np.testing.assert_array_equal(found.norms[key], norm, key)
