"""Adapters at run time: torch's numbers, the same bits on cpu and numpy, MLX close to them, nothing changed by none."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitnet_mlx.backends import numpy_ref as ref
from bitnet_mlx.backends.low_rank import LowRank
from bitnet_mlx.formats import words2
from bitnet_mlx.models.cache_state import fingerprint
from bitnet_mlx.models.decoder_cpu import CpuDecoder
from bitnet_mlx.models.decoder_mlx import MlxModel
from bitnet_mlx.models.decoder_numpy import NumpyDecoder
from bitnet_mlx.models.weights import DecoderWeights
from bitnet_mlx.ternary import TernaryTensor, quantize_activations
from tests.support.random_model import random_weights, tiny_config

GOLDEN = np.load(Path(__file__).parents[1] / "train" / "data" / "lora_torch.npz")
LLAMA = dict(model_type="llama", hidden_act="silu", sub_norms=False, tie_word_embeddings=False)
IDS = np.random.default_rng(1).integers(0, 67, 19).tolist()
# Each case: changes to the config, then arguments of random_weights.
CASES: dict[str, tuple[dict, dict]] = {
    "bitnet": ({}, {}),
    "scales in groups, biases": (LLAMA, dict(scale="group", bias=True)),
    "some linears float": ({}, dict(dense=("self_attn.k_proj", "mlp.up_proj"), bias=True)),
    "some with a norm of their own": (
        dict(LLAMA, linear_norm_eps=1e-5), dict(normed=("mlp.up_proj", "self_attn.q_proj", "self_attn.o_proj"), bias=True)
    ),
    "float activations": (dict(hidden_size=200, activation_bits=16), dict(scale="row")),
}  # fmt: skip


def with_parts(
    weights: DecoderWeights, rank: int, dora: bool, bare: tuple[str, ...] = (), scale: float = 0.5
) -> DecoderWeights:
    """A random adapter on every linear but those whose last name is in `bare`."""
    rng = np.random.default_rng(2)
    linears = dict(weights.linears)
    for name, linear in weights.linears.items():
        if name.rpartition(".")[2] not in bare:
            n, k = linear.weight.shape
            a, b = (rng.standard_normal(shape).astype(np.float32) / 8 for shape in ((k, rank), (rank, n)))
            m = rng.uniform(0.5, 2, n).astype(np.float32) if dora else None
            linears[name] = replace(linear, adapter=LowRank(a, b, scale, m).for_weight(linear.weight))
    return replace(weights, linears=linears)


def run(decoder: Any, cuts: tuple[int, ...] = ()) -> np.ndarray:
    cache, edges = decoder.make_cache(), [0, *cuts, len(IDS)]
    return np.concatenate([decoder.step([IDS[a:b]], [cache], "all")[0] for a, b in itertools.pairwise(edges)])


def test_a_row_of_zeros_stays_zero_under_dora() -> None:
    t = np.array([[0] * 8, [1] * 8], np.int8)
    weight = TernaryTensor(words2.pack(t), np.asarray(1, np.float32), t.shape)
    a, b, m = np.ones((8, 1), np.float32), np.array([[0, 1]], np.float32), np.array([0, 3], np.float32)
    part = LowRank(a, b, 1.0, m).for_weight(weight)
    assert part.gain is not None and part.gain[0] == 0 and part.gain[1] == np.float32(3 / np.sqrt(8 * 4))
    assert part.nbytes == a.nbytes + b.nbytes + 8  # the gain of two rows


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_outputs_are_torchs(kind: str) -> None:
    t = GOLDEN["t"]
    weight = TernaryTensor(words2.pack(t), GOLDEN["row_scale"], t.shape)
    part = LowRank(GOLDEN["lora_a"], GOLDEN["lora_b"], 2.5, GOLDEN["m"] if kind == "dora" else None).for_weight(weight)
    x = GOLDEN["x"]
    y = ref.adapted(ref.quantized_linear(*quantize_activations(x), weight), x, part) + GOLDEN["bias"]
    np.testing.assert_allclose(y, GOLDEN[f"{kind}.y"], rtol=1e-5, atol=1e-5)
    q, s = quantize_activations(x)
    fused = part.fused(weight, slice(None))  # the same but for the codes, which the adapter's part does not see
    low = x @ fused.T + GOLDEN["bias"]
    gain = 1 if part.gain is None else part.gain
    low += gain * ((q / s[:, None] - x) @ weight.rows(slice(None)).T)
    np.testing.assert_allclose(low, GOLDEN[f"{kind}.y"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("rank", "dora", "bare"), [(3, False, ()), (40, True, ("v_proj", "up_proj"))])
def test_cpu_has_the_bits_of_numpy_and_mlx_is_near(case: str, rank: int, dora: bool, bare: tuple[str, ...]) -> None:
    changes, arguments = CASES[case]
    base = random_weights(tiny_config(**changes), **arguments)
    weights = with_parts(base, rank, dora, bare)
    want = run(NumpyDecoder(weights))
    assert np.abs(want - run(NumpyDecoder(base))).max() > 0.1 * want.std()
    for serial_below in (0, 1 << 40):  # every job on all threads; every job on one
        decoder = CpuDecoder(weights, serial_below=serial_below)
        for cuts in ((), (1, 2, 4, 8, 9, 18)):  # panels; 1, 2 and 4 rows at once, panels of 5 and 9
            found = run(decoder, cuts)
            assert np.array_equal(found, want), f"{(found != want).sum()} differ, by {np.abs(found - want).max()}"
    # A code that flips moves a position's logits by a few percent of their spread (README); most positions have none.
    near = np.abs(run(MlxModel(weights)) - want).max(axis=-1) / want.std()
    assert np.median(near) < 1e-3 and near.max() < 0.2, near


def test_a_part_of_zeros_changes_no_bit() -> None:
    base = random_weights(tiny_config(), bias=True)
    zeros = dict(base.linears)
    for name, linear in base.linears.items():
        n, k = linear.weight.shape
        zeros[name] = replace(linear, adapter=LowRank(np.ones((k, 2), np.float32), np.zeros((2, n), np.float32), 20.0))
    weights = replace(base, linears=zeros)
    assert np.array_equal(run(NumpyDecoder(weights)), run(NumpyDecoder(base)))
    assert np.array_equal(run(CpuDecoder(weights)), run(NumpyDecoder(base)))
    assert weights.nbytes == base.nbytes + sum(x.adapter.nbytes for x in zeros.values() if x.adapter is not None)


def test_a_stored_prompt_belongs_to_its_adapter() -> None:
    base = random_weights(tiny_config())
    once, twice = (with_parts(base, 2, False, scale=scale) for scale in (0.5, 1.0))
    for make in (NumpyDecoder, CpuDecoder, MlxModel):
        prints = [fingerprint(make(weights)) for weights in (base, once, twice, once)]
        assert len(set(prints)) == 3 and prints[1] == prints[3]
