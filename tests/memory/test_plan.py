"""The plan's arithmetic on machines of 8 to 512 GB; what fits is worked out here by hand."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from bitnet_mlx.errors import ConfigError
from bitnet_mlx.memory.plan import GIB, Demand, Machine, budget, longest_context, make_plan
from bitnet_mlx.models.config import DecoderConfig
from bitnet_mlx.models.demand import MatrixSize, ModelSize, demand, kv_row_bytes

MB = 1 << 20


def demand_of(engine: str, fixed: int = 0, a_position: int = 0, longest: int = 4096, load_extra: int = 0) -> Demand:
    """fixed bytes of weights; so many bytes a position and sequence."""
    return Demand(
        "m", engine, fixed, 0, lambda context, batch: a_position * context * batch, lambda context, batch: 0, 0,
        load_extra, longest, True,
    )  # fmt: skip


# Bytes that one process should take, in GiB: macOS lets a GPU have two thirds up to 36 GB, three quarters above; others
# leave an eighth to the rest, at least 2 and at most 16.
BUDGETS = {
    8: (16 / 3, 6.0), 16: (32 / 3, 14.0), 24: (16.0, 21.0), 32: (64 / 3, 28.0), 36: (24.0, 31.5), 48: (36.0, 42.0),
    64: (48.0, 56.0), 96: (72.0, 84.0), 128: (96.0, 112.0), 192: (144.0, 176.0), 256: (192.0, 240.0),
    512: (384.0, 496.0),
}  # fmt: skip


@pytest.mark.parametrize("memory", BUDGETS)
def test_budgets(memory: int) -> None:
    metal, others = BUDGETS[memory]
    machine = Machine(memory * GIB)
    assert budget(machine, "metal") == int(metal * GIB)
    assert budget(machine, "cpu") == budget(machine, "mlx") == int(others * GIB)


def test_what_the_gpu_says_comes_first() -> None:
    machine = Machine(64 * GIB, working_set=50 * GIB)
    assert budget(machine, "metal") == 50 * GIB
    assert budget(machine, "cuda") == 50 * GIB
    assert budget(machine, "cpu") == 56 * GIB
    assert budget(Machine(None), "cpu") is None
    assert budget(Machine(1 * GIB), "cpu") == 0


# bitnet-b1.58-2B-4T: 30 layers, 5 key-value heads of 128, 2.08e9 ternary weights, a head of 128256 x 2560.
CONFIG = DecoderConfig(
    "bitnet", 128256, 2560, 6912, 30, 20, 5, 128, max_position_embeddings=1 << 20, hidden_act="relu2", sub_norms=True,
    tie_word_embeddings=True,
)  # fmt: skip
SIZE = ModelSize(
    "2b4t", CONFIG, MatrixSize(128256, 2560, "bfloat16"), None,
    [{name: MatrixSize(n, k, "ternary") for name, (n, k) in CONFIG.linear_shapes().items()} for _ in range(30)],
)  # fmt: skip


def test_bytes_of_the_2b_model() -> None:
    cpu = demand(SIZE, "cpu", threads=2)
    a_layer = 2560 * 2560 * 2 + 640 * 2560 * 2 + 3 * 6912 * 2560
    norms = 30 * (2560 * 3 + 6912) + 2560
    assert cpu.weights == 30 * (a_layer // 4 + 7 * 4) + 4 * norms
    assert cpu.head == 128256 * 2560 * 2
    assert cpu.kv(4096, 3) == 3 * 4096 * 2 * 30 * 5 * 128 * 4
    metal = demand(SIZE, "metal", dtype="bfloat16", head_bits=8)
    assert metal.head == 128256 * 2560 + 128256 * 40 * 8
    assert metal.weights == cpu.weights + 30 * 4 * (2560 + 640 + 640 + 2 * 6912)
    assert metal.kv(4096, 1) == (4096 + 64) * 2 * 30 * 5 * 128 * 2
    assert demand(SIZE, "mlx", head_bits=4).head == 128256 * 2560 // 2 + 128256 * 40 * 8
    assert demand(SIZE, "mlx", kv_bits=8).kv(1000, 1) == 1000 * 2 * 30 * 5 * (128 + 2 * 8)
    assert kv_row_bytes(64, 4) == 32 + 8
    with pytest.raises(ConfigError, match="multiple of 32"):
        kv_row_bytes(80 - 1, 8)


def by_hand(machine_gib: int) -> float:
    """Positions of the 2B model with an 8-bit head in bfloat16 on a Mac: what is left, over the bytes of a position.

    80 MiB of process and the logits; 512 rows in float32 of 8 feed-forward and 4 hidden widths, or of what attention needs
    and, where its cache grows, a layer's old array; a position has keys and values of 30 x 5 heads of 128 in bfloat16, and
    64 cosines and sines in float32.
    """
    head = 128256 * 2560 + 128256 * 40 * 8
    words = 30 * (2560 * 2560 * 2 + 640 * 2560 * 2 + 3 * 6912 * 2560) / 4
    room = BUDGETS[machine_gib][0] * GIB - 80 * MB - head - words - 4 * 128256
    layer = 2 * 5 * 128 * 2
    position = 30 * layer + 2 * 64 * 4
    feeding = (room - 4 * 512 * (8 * 6912 + 4 * 2560)) / position
    attending = (room - 4 * 512 * (10 * 2560 + 6 * 640 + 2 * 2560)) / (position + layer)
    return min(feeding, attending, 1 << 20)


@pytest.mark.parametrize("memory", [8, 16, 24, 36, 64, 128, 512])
def test_longest_context_of_the_2b_model_on_macs(memory: int) -> None:
    metal = demand(SIZE, "metal", dtype="bfloat16", head_bits=8)
    plan = make_plan(metal, Machine(memory * GIB), 4096)
    assert plan.fits
    assert plan.longest_context == pytest.approx(by_hand(memory), abs=512)  # caches grow by 256, tables by 1024
    assert make_plan(metal, Machine(memory * GIB), plan.longest_context).fits
    if plan.longest_context is not None and plan.longest_context < 1 << 20:
        assert not make_plan(metal, Machine(memory * GIB), plan.longest_context + 256).fits


@pytest.mark.parametrize(("memory", "fits"), [(8, False), (16, False), (24, True), (32, True), (512, True)])
def test_a_model_of_16_gib(memory: int, fits: bool) -> None:
    plan = make_plan(demand_of("mlx", 16 * GIB), Machine(memory * GIB), 1)
    assert plan.fits is fits
    assert plan.longest_context == (4096 if fits else 0)
    assert ("It fits" in plan.table()) is fits


def test_the_longest_context_is_the_last_that_fits() -> None:
    one = demand_of("cpu", GIB, MB, longest=1 << 20)
    assert longest_context(one, 2 * GIB) == 1024
    assert longest_context(one, 2 * GIB - 1) == 1023
    assert longest_context(one, 2 * GIB, batch=4) == 256
    assert longest_context(one, GIB - 1) == 0


def test_loading_may_need_the_most() -> None:
    plan = make_plan(demand_of("mlx", GIB, MB, load_extra=4 * GIB), Machine(8 * GIB, 3 * GIB), 100)
    assert (plan.total, plan.needed) == (GIB + 100 * MB, 5 * GIB)
    assert plan.fits
    assert not plan.fits_now
    assert "Only 3.0 GiB are free now." in plan.table()


def test_limits_for_mlx() -> None:
    plan = make_plan(demand_of("metal", 10 * GIB, MB), Machine(64 * GIB), 1000)
    assert plan.mlx_limits is not None
    assert plan.mlx_limits.memory == 48 * GIB
    assert plan.mlx_limits.wired == 176 * 64 * MB  # 11240 MiB in whole steps of 64
    small = replace(demand_of("metal", 10 * GIB), activations=lambda context, batch: 3 * GIB)
    fits = make_plan(small, Machine(64 * GIB)).mlx_limits
    tight = make_plan(small, Machine(20 * GIB)).mlx_limits
    beyond = make_plan(demand_of("metal", 100 * GIB), Machine(64 * GIB)).mlx_limits
    assert fits is not None and fits.cache == 6 * GIB  # what activations use, twice
    assert tight is not None and tight.cache == 20 * GIB * 2 // 3 - 13 * GIB  # and no more than is left
    assert beyond is not None and (beyond.wired, beyond.cache) == (48 * GIB, 0)
    assert make_plan(demand_of("cpu", GIB), Machine(64 * GIB)).mlx_limits is None
    assert make_plan(demand_of("mlx", GIB), Machine(None)).mlx_limits is None


def test_a_machine_that_tells_nothing() -> None:
    plan = make_plan(demand_of("cpu", GIB), Machine(None))
    assert (plan.fits, plan.fits_now, plan.longest_context, plan.budget) == (None, None, None, None)
    assert "not known" in plan.table()


def test_what_cannot_be() -> None:
    for context, batch in ((0, 1), (-1, 1), (1, 0)):
        with pytest.raises(ConfigError, match="context is (0|-1); 1 to 16777216 is allowed|batch is 0; .*1"):
            make_plan(demand_of("cpu"), Machine(None), context, batch)


def test_record_and_html() -> None:
    plan = make_plan(demand(SIZE, "metal", dtype="bfloat16"), Machine(8 * GIB, 7 * GIB), 2 << 20)
    record = json.loads(json.dumps(plan.record()))
    assert record["machine"] == {"total": 8 * GIB, "available": 7 * GIB, "working_set": None}
    assert record["fits"] is False
    html = plan._repr_html_()
    assert "does not fit this machine" in html
    assert "at most 1048576 positions" in html
    assert "estimate" in html
