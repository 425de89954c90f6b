"""Losses in pieces of the positions: float64's numbers, the same as in one piece, and no array of all logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from bitnet_mlx.train import pieces
from bitnet_mlx.train.losses import KEPT, output_losses, token_losses
from bitnet_mlx.train.model import TrainDecoder
from bitnet_mlx.train.pieces import Head, cut
from bitnet_mlx.train.teacher import most_likely
from tests.train.support import options

GOLDEN = np.load(Path(__file__).parent / "data" / "distill_torch.npz")
B, L, H, V = 3, 5, 3, 41
LARGE, SMALL = 1 << 30, 1  # one piece; as many as there may be, here five


def logs(x: np.ndarray) -> np.ndarray:
    top = x.max(-1, keepdims=True)
    return x - top - np.log(np.exp(x - top).sum(-1, keepdims=True))


def tied(weight: mx.array) -> Head:
    return Head(lambda x, w: x @ w.T, V, (weight,))


def test_pieces_are_equal_and_their_bytes_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    head = Head(lambda x: x, 100)
    for count, rows, sizes in ((10, 4, [4, 4, 2]), (9, 3, [3, 3, 3]), (7, 7, [7]), (11, 10, [6, 5]), (2, 0, [1, 1])):
        monkeypatch.setattr(pieces, "BYTES", rows * 400 + 399)
        found = cut(count, head)
        assert [at.stop - at.start for at in found] == sizes
        assert [i for at in found for i in range(at.start, at.stop)] == list(range(count))
    monkeypatch.setattr(pieces, "BYTES", 400)
    trained = Head(head.product, 100, (mx.zeros((100, 6)),))
    assert len(cut(24, trained)) == 4  # of 6 positions, whose logits are as large as the weights


@pytest.mark.parametrize("nbytes", [SMALL, LARGE])
@pytest.mark.parametrize("k", [0.0, 0.3, 1.0])
def test_losses_and_gradients_are_those_of_float64(nbytes: int, k: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "BYTES", nbytes)
    rng, t, scale = np.random.default_rng(3), 1.7, 0.25
    x, w, theirs = rng.normal(size=(B, L, H)), rng.normal(size=(V, H)), rng.normal(size=(B, L, H)) * 2
    targets, counts = rng.integers(0, V, (B, L)), rng.integers(0, 3, (B, L)).astype(np.float64) / 2
    rows = {"targets": mx.array(targets), "counts": mx.array(counts, mx.float32), "ready": mx.array(theirs, mx.float32)}

    def loss(x: mx.array, w: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        found = output_losses(tied(w), x, rows, scale, k, t, tied(mx.array(w, mx.float32)))
        return found["loss"], found["cross_entropy"], found["kl"]

    (total, entropy, kl), (dx, dw) = mx.value_and_grad(loss, argnums=[0, 1])(
        mx.array(x, mx.float32), mx.array(w, mx.float32)
    )
    s, said, each = x @ w.T, theirs @ w.T, counts * scale
    expected = -(np.take_along_axis(logs(s), targets[..., None], -1)[..., 0] * each).sum()
    p, q = logs(said / t), logs(s / t)
    apart = t**2 * ((np.exp(p) * (p - q)).sum(-1) * each).sum()
    ds = (1 - k) * (np.exp(logs(s)) - np.eye(V)[targets]) + k * t * (np.exp(q) - np.exp(p))
    ds = ds * each[..., None]
    assert entropy.item() == pytest.approx(expected, rel=1e-5)
    assert kl.item() == (pytest.approx(apart, rel=1e-5) if k else 0)
    assert total.item() == pytest.approx((1 - k) * expected + k * apart, rel=1e-5)
    np.testing.assert_allclose(np.array(dx), ds @ w, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.array(dw), np.einsum("blv,blh->vh", ds, x), rtol=1e-4, atol=1e-5)


def test_the_most_likely_tokens_in_pieces_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    t, s = (mx.array(GOLDEN[f"kept.{name}"]) for name in "ts")
    monkeypatch.setattr(pieces, "BYTES", 2 * t.shape[-1] * 4)  # two positions at a time
    rows = dict(zip(KEPT, most_likely(t, 5, 1.6), strict=True), targets=mx.zeros(t.shape[:2], mx.int32))
    head = Head(lambda x: x, t.shape[-1])
    loss, found = mx.value_and_grad(lambda s: output_losses(head, s, rows, 1 / rows["targets"].size, 1.0, 1.6)["loss"])(
        s
    )
    assert loss.item() == pytest.approx(float(GOLDEN["kept.loss"]), rel=1e-5)
    expected = GOLDEN["kept.grad0"]
    np.testing.assert_allclose(np.array(found), expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def decoder(place: Path, dtype: Any) -> TrainDecoder:
    mx.random.seed(1)
    return TrainDecoder(options(place, place, hidden_size=8, num_layers=1, num_heads=2).model_config(60), dtype=dtype)


@pytest.mark.parametrize(("dtype", "near"), [(mx.float32, 1e-5), (mx.bfloat16, 2e-2)])
def test_a_tied_head_has_both_gradients(
    dtype: mx.Dtype, near: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against MLX's own gradient of all logits at once."""
    model = decoder(tmp_path, dtype)
    ids = mx.random.randint(0, 60, (2, 41))

    def plain(parameters: dict[str, Any]) -> mx.array:
        model.update(parameters)
        return mx.fast.cross_entropy(model(ids[:, :-1]).astype(mx.float32), ids[:, 1:]).mean()

    def lean(parameters: dict[str, Any]) -> mx.array:
        model.update(parameters)
        return output_losses(model.head(), model.ready(ids[:, :-1]), {"targets": ids[:, 1:]}, 1 / 80)["loss"]

    parameters: Any = model.parameters()
    monkeypatch.setattr(pieces, "BYTES", SMALL)
    assert len(cut(80, model.head())) == 10
    found = [mx.value_and_grad(function)(parameters) for function in (plain, lean)]
    assert found[1][0].item() == pytest.approx(found[0][0].item(), rel=1e-6)
    given: list[dict[str, mx.array]] = [dict(tree_flatten(gradients)) for _, gradients in found]  # type: ignore[arg-type]
    for name, gradient in given[0].items():
        assert given[1][name].dtype == mx.float32
        norm = mx.sqrt(mx.square(gradient).sum())
        assert mx.sqrt(mx.square(given[1][name] - gradient).sum()) <= near * norm, name
    scored = token_losses(model.head(), model.ready(ids[:, :-1]), ids[:, 1:])
    assert scored.shape == (2, 40) and scored.mean().item() == pytest.approx(found[0][0].item(), rel=1e-5)


def peak(function: Callable[[], Any]) -> int:
    """Bytes above those that are held before."""
    mx.clear_cache()
    mx.reset_peak_memory()
    held = mx.get_active_memory()
    mx.eval(function())
    return mx.get_peak_memory() - held


@pytest.mark.parametrize("k", [0.0, 0.5])
def test_all_logits_are_never_there(k: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """4,096 positions of 2,000 tokens: 33 MB in float32, several times over where they are computed at once."""
    width, count = 2000, 4096
    w, x = mx.random.normal((width, 4)), mx.random.normal((1, count, 4))
    rows = {"targets": mx.random.randint(0, width, (1, count)), "ready": mx.random.normal((1, count, 4))}
    mx.eval(w, x, rows)
    head = Head(lambda x: x @ w.T, width)

    def step() -> Any:
        return mx.value_and_grad(lambda x: output_losses(head, x, rows, 1.0, k, 1.0, head)["loss"])(x)

    monkeypatch.setattr(pieces, "BYTES", LARGE)
    whole = peak(step)
    monkeypatch.setattr(pieces, "BYTES", 1 << 20)
    assert peak(step) < whole / 4 and whole > 2 * width * count * 4
    assert peak(lambda: token_losses(head, x, rows["targets"])) < width * count * 4 / 2
