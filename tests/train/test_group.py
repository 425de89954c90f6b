"""What is refused before the ranks of a group look for one another."""

from __future__ import annotations

import mlx.core as mx
import pytest

from bitnet_mlx.errors import ConfigError, TrainError
from bitnet_mlx.train.group import join

NCCL = {"MLX_RANK": "1", "MLX_WORLD_SIZE": "2", "NCCL_HOST_IP": "127.0.0.1"}


def test_a_rank_of_nccl_sees_one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPUs are not there: their number alone is made up."""
    monkeypatch.setattr(mx, "device_count", lambda kind: 2 if kind == mx.gpu else 1)
    with pytest.raises(ConfigError, match="sees 2 GPUs.* mlx.launch --backend nccl, or give .* CUDA_VISIBLE_DEVICES"):
        join(1.0, NCCL.get)
    monkeypatch.setattr(mx, "device_count", lambda _: 1)
    with pytest.raises(TrainError, match="could not find one another"):  # nor is MLX's CUDA back end, or a rank 0
        join(1.0, NCCL.get)


def test_a_process_that_no_launcher_started_is_alone() -> None:
    assert join(1.0, {"NCCL_HOST_IP": "127.0.0.1"}.get).size == 1
