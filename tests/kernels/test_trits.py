"""The trits5 mat-vec on an emulated grid: integers, outputs to the last bit, planted faults, refusals."""

import itertools

import ml_dtypes
import numpy as np
import pytest

from bitnet_mlx.backends.kernels import trits
from bitnet_mlx.backends.kernels.layout import Layout, prepare
from bitnet_mlx.errors import ConfigError
from bitnet_mlx.formats import trits5
from tests.backend import shapes
from tests.emulator import FaultError, emulate
from tests.emulator.compiler import FLAGS
from tests.kernels import cuda_text
from tests.kernels.cuda_host import run_on_host

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
PAIRS = [(1, 8), (3, 20), (5, 21), (2, 100), (33, 128), (9, 660), (3, 2560), (5, 6912)]
# One compilation each: rows of activations, rows of the weight, simdgroups, scales, bias, residual, dtype.
FORMS = [
    (1, 1, 8, "tensor", False, False, "float32"),
    (1, 2, 2, "row", True, True, "bfloat16"),
    (1, 4, 2, "row", True, False, "float16"),
    (1, 8, 4, "tensor", False, True, "bfloat16"),
    (2, 4, 1, "row", False, True, "float32"),
    (3, 8, 3, "row", True, False, "bfloat16"),
    (8, 4, 2, "tensor", True, True, "float32"),
]


def problem(n, k, m):
    """(t int8 [N, K], q int8 [M, K], their integer products [M, N])."""
    rng = np.random.default_rng((n, k))
    t = rng.integers(-1, 2, (n, k)).astype(np.int8)
    t[::5], t[3::7] = 1, -1  # rows of one value: the largest sums
    q = np.roll(shapes.codes(rng, k), n + k + m, axis=0)[:m]
    return t, q, (q.astype(np.float64) @ t.T.astype(np.float64)).astype(np.int64)


def launch(t, q, s, scale, bias=None, residual=None, *, rows=4, simdgroups=2, dtype="float32"):
    xq, xb = prepare(q, Layout("trits"))
    variant = trits.TritsVariant(rows, simdgroups)
    return trits.trits_matvec(xq, xb, s, trits5.pack(t), scale, bias, residual, variant=variant, dtype=dtype)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(map(str, form)))
def test_outputs_to_the_last_bit(form):
    m, rows, simdgroups, kind, with_bias, with_residual, dtype = form
    for n, k in PAIRS:
        t, q, product = problem(n, k, m)
        rng = np.random.default_rng((n, k, 7))
        low, high = (5, 0) if dtype == "float16" else (-9, 2)  # no output above 65504
        s = np.exp(rng.uniform(low, 16, m)).astype(np.float32)
        scale = np.asarray(np.exp(rng.uniform(-8, high, n if kind == "row" else ())), np.float32)
        bias = rng.standard_normal(n).astype(np.float32) if with_bias else None
        residual = rng.standard_normal((m, n)).astype(DTYPES[dtype]) if with_residual else None
        [y] = emulate(launch(t, q, s, scale, bias, residual, rows=rows, simdgroups=simdgroups, dtype=dtype))
        expected = shapes.outputs(product[:, None], s, scale, bias).astype(DTYPES[dtype])
        if residual is not None:
            expected = (residual.astype(np.float32) + expected.astype(np.float32)).astype(DTYPES[dtype])
        assert y.dtype == DTYPES[dtype]
        shapes.same(y.astype(np.float32), expected.astype(np.float32), f"{form}, N {n}, K {k}")


def test_largest_sums_are_exact():
    """One row of every extreme, as wide as it is allowed to be."""
    k = trits.MOST_K
    t = np.stack([np.ones(k), -np.ones(k), np.where(np.arange(k) % 2, 1, -1)]).astype(np.int8)
    q = np.stack([np.full(k, -128), np.full(k, 127), np.where(np.arange(k) % 2, 127, -128)]).astype(np.int8)
    one = np.ones(3, np.float32)
    [y] = emulate(launch(t, q, one, np.float32(1), rows=2))
    shapes.same(y, q.astype(np.int64) @ t.T.astype(np.int64), "accumulators")


def test_every_variant_is_exact():
    """Every shape's list of variants, and each of them once."""
    tried = set()
    for (n, k), m in itertools.product([(5, 100), (2560, 2560)], (1, 2, 8)):
        found = trits.variants(n, k, m)
        assert found and len(set(found)) == len(found)
        assert all(v == v.fit(m) for v in found)
        for variant in found:
            if (variant.rows, m) in tried or m == 2:
                continue
            tried.add((variant.rows, m))
            t, q, product = problem(5, 100, m)
            made = launch(t, q, np.ones(m, np.float32), np.float32(1), rows=variant.rows, simdgroups=variant.simdgroups)
            shapes.same(emulate(made)[0], product, f"{variant}, M {m}")


@pytest.mark.parametrize("flag", FLAGS)
def test_other_compilers_and_chips(flag):
    """Fast math, contraction or none, half denormals as zero: every product and sum stays exact."""
    t, q, product = problem(5, 2560, 3)
    made = launch(t, q, np.ones(3, np.float32), np.float32(1))
    shapes.same(emulate(made, flags=(flag,), seed=5)[0], product, flag)


def test_cuda_form(tmp_path):
    """The CUDA text of the same body, run on the CPU; and through NVIDIA's compiler where there is one."""
    for m, n, k, residual in ((1, 9, 660, True), (3, 1, 8, False)):
        t, q, product = problem(n, k, m)
        one = np.ones(m, np.float32)
        extra = product.astype(np.float32) if residual else None
        made = launch(t, q, one, np.full(n, 2, np.float32), residual=extra)
        shapes.same(run_on_host(made)[0], product * (3 if residual else 2), f"M {m}, N {n}, K {k}")
        if cuda_text.NVCC:
            assert cuda_text.compile_cuda(made, tmp_path).spills == 0


FAULTS = [
    ("a mask one bit short", "REST = 0x03FC03FCu", "REST = 0x03F803FCu"),
    ("a digit's mask moved", "DIGIT = 0x0C000C00u", "DIGIT = 0x0C001800u"),
    ("a byte in the wrong place", "& 0x00FF00FFu) << 2", "& 0x00FF00FFu) << 1"),
    ("bias forgotten", "- xb[m]", "- 0.0f * xb[m]"),
    ("lanes that overlap", "i += 32", "i += 31"),
    ("activations that stand still", "xp += 160", "xp += 0"),
    ("a guard lost", "m < M && n < rows", "m < M"),
    ("an output of another row", "lane == m * R + r", "lane == m * R + (r ^ 1)"),
]


@pytest.mark.parametrize(("found", "instead"), [f[1:] for f in FAULTS], ids=[f[0] for f in FAULTS])
def test_planted_fault_is_caught(found, instead):
    t, q, product = problem(5, 660, 1)
    made = launch(t, q, np.ones(1, np.float32), np.float32(1), rows=2)
    shapes.same(emulate(made)[0], product, "as it is")
    try:
        [y] = emulate(made, edit=(found, instead))
    except FaultError:
        return
    assert not np.array_equal(y, product)


def test_refusals():
    t, q, _ = problem(4, 660, 1)
    one = np.ones(1, np.float32)
    with pytest.raises(ConfigError, match="9 rows of activations"):
        launch(t, np.zeros((9, 660), np.int8), np.ones(9, np.float32), one)
    with pytest.raises(ConfigError, match="groups of 128"):
        launch(t, q, one, np.ones((4, 6), np.float32))
    with pytest.raises(ConfigError, match="exact up to 65536"):
        launch(np.zeros((1, 65_560), np.int8), np.zeros((1, 65_560), np.int8), one, one)
    xq, xb = prepare(q, Layout("plain"))
    with pytest.raises(ConfigError, match="layout plain"):
        trits.trits_matvec(
            xq, xb, one, trits5.pack(t), one, layout=Layout("plain"), variant=trits.TritsVariant(), dtype="float32"
        )
