"""bench matmul's measuring, on MLX's CPU device with the reference in place of a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from bitnet_mlx.backends.kernels.choices import Choices
from bitnet_mlx.backends.kernels.chooser import Measured
from bitnet_mlx.backends.kernels.launch import Launch
from bitnet_mlx.backends.kernels.tune import Tuner
from bitnet_mlx.backends.mlx_import import mx
from bitnet_mlx.bench import matmul, matmul_mlx
from bitnet_mlx.bench.turns_mlx import after, outputs
from bitnet_mlx.errors import ConfigError
from tests.kernels.twin import twin


def chooser(folder: Path, monkeypatch: pytest.MonkeyPatch, runs: bool = True) -> Measured:
    """Asks a device that computes as the reference does, or fails; our time there is always the better one."""
    monkeypatch.setenv("BITNET_MLX_CACHE_DIR", str(folder))

    def runner(launch: Launch) -> list[mx.array]:
        if not runs:
            raise RuntimeError("no such device")
        return twin(launch)

    tuner = Tuner("metal", runner, lambda label, chain: 2.0 if label.startswith("stock") else 1.0)
    return Measured("metal", tuner, Choices("metal", "a chip", "1", "2"))


def test_every_contender_is_timed_on_the_same_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul_mlx, "CALLS", 2)
    monkeypatch.setattr(matmul_mlx, "REPEATS", 2)
    (found,) = matmul_mlx.measure([(24, 256, 2)], chooser(tmp_path, monkeypatch), 1e9)
    assert found.exact and "matvec" in found.kernel and found.floor == 24 * 256 / 4 / 1e9 * 1e6
    assert list(found.times) == ["ours", "stock bfloat16", "stock float32", "dense bfloat16"] == list(found.together)
    record = found.record()
    assert set(record["ratios"]) == {"stock bfloat16", "stock float32", "dense bfloat16"}  # type: ignore[arg-type]
    top = {"device": "a chip", "backend": "metal", "copy_gb_s": 1.0, "empty_us": 1.0, "shapes": [record]}
    assert any("24x256 M 2" in line and "exact" in line for line in matmul.lines(top))


@pytest.mark.filterwarnings("ignore:.*switched off")
def test_a_kernel_that_is_off_is_said_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul_mlx, "CALLS", 2)
    monkeypatch.setattr(matmul_mlx, "REPEATS", 2)
    (found,) = matmul_mlx.measure([(8, 128, 1)], chooser(tmp_path, monkeypatch, runs=False), 1e9)
    assert found.kernel == "off" and "ours" not in found.times and found.record()["ratios"] == {}


def test_chained_calls_wait_for_each_other() -> None:
    x = mx.ones((2,))
    calls: list[bool] = []

    def call(i: int, before: mx.array | None) -> mx.array:
        calls.append(before is not None)
        return after(x, before) + i

    assert outputs(call, 3, chained=True)[0].tolist() == [3.0, 3.0] and calls == [False, True, True]
    assert len(outputs(call, 3, chained=False)) == 3 and calls[3:] == [False] * 3


def test_it_needs_a_gpu_of_ours() -> None:
    with pytest.raises(ConfigError, match="needs a Mac with Apple silicon or an NVIDIA GPU"):
        matmul.measure("cpu", (1,))
    with pytest.raises(ConfigError, match="--rows is 0"):
        matmul.measure("auto", (0,))
