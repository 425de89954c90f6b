"""The soak of soak.py in small, in this process; `python -m tests.serve.soak` is the whole one."""

from __future__ import annotations

from pathlib import Path

from bitnet_mlx.generation import generate
from bitnet_mlx.memory.system import resident_bytes
from bitnet_mlx.models.decoder_cpu import CpuDecoder
from tests.serve.running import model, serving
from tests.serve.soak import Soak, make_prompts

FLAT = 64 << 20  # bytes: clients and server share this process


def rss() -> int:
    return resident_bytes() or 0


def test_mixed_requests(tmp_path: Path) -> None:
    small, tokenizer = model(tmp_path)
    decoder, alone = CpuDecoder(small.weights), CpuDecoder(small.weights)
    with serving(decoder, tokenizer, running=8, waiting=64, prefix_bytes=1 << 20, pooling="mean") as server:
        soak = Soak(
            server.url, "test/model", make_prompts(400, 100, 20),
            lambda ids, count, how: generate(alone, tokenizer, ids, count, sampling=how), rss,
        )  # fmt: skip
        result = soak.run(150, 16)
    assert not result.wrong, result.wrong
    assert sum(result.counts.values()) - result.counts["told to come again"] == 150
    assert result.compared >= 90 and result.growth < FLAT, result.rss
