"""The rewriting of Metal text and of LLVM IR, on small pieces; and what MLX generates."""

from __future__ import annotations

import re

import ml_dtypes
import numpy as np
import pytest

from tests.emulator import RefusedError, emulate, runner
from tests.emulator.instrument import instrument
from tests.emulator.probe import launch
from tests.emulator.text import check_metal, check_qualifiers, rewritten, signature, threadgroup_memory
from tests.emulator.trace import generated_text


def declared(text: str) -> list[str]:
    """The types and names that became references into the runtime's memory."""
    found = re.findall(r"typedef (.*?) emulator_(\w+)_\d+((?:\[.*?\])*);", threadgroup_memory(text))
    return [f"{kind} {name}{sizes}" for kind, name, sizes in found]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{ threadgroup float a[32]; }", ["float a[32]"]),
        ("{ threadgroup float a[2][R * 4], b; }", ["float a[2][R * 4]", "float b"]),
        (
            "{\n  threadgroup T a[4];\n  threadgroup metal::vec<T, 4> b[N<2>()];\n}",
            ["T a[4]", "metal::vec<T, 4> b[N<2>()]"],
        ),
        ("{ __local alignas(16) half2 a[8]; }", ["half2 a[8]"]),
        ("{ alignas(16) threadgroup half a[8]; }", ["half a[8]"]),
        ("; threadgroup float* p = a;", []),
        ("{ threadgroup_barrier(mem_flags::mem_threadgroup); }", []),
        ("void f(threadgroup float* a, threadgroup float& b) { }", []),
        ("{ threadgroup const float* p = &a[2]; }", []),
    ],
)
def test_threadgroup_declarations(text, expected):
    assert declared(text) == expected


def test_alignment_of_threadgroup_memory_is_kept():
    assert re.search(r"emulator_slot\(.*, 16\)", threadgroup_memory("{ threadgroup alignas(16) half a[8]; }"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x = 1.0 + .5 - 2e3;", "x = 1.0f + .5f - 2e3f;"),
        ("x = 1.0f + 0x1F + 12 + 3u + 1.5h;", "x = 1.0f + 0x1F + 12 + 3u + 1.5h;"),
        ("x = v.x2 + a1.0;", "x = v.x2 + a1.0;"),
        ("x = 1.e-5;", "x = 1.e-5f;"),
    ],
)
def test_literals_are_float(text, expected):
    assert rewritten(text).strip() == expected


def test_constructors_lose_thread_and_methods_keep_it():
    text = "struct A { int n; A(int m) __private : n(m) {} int get() const __private { return n; } };"
    assert rewritten(text).strip() == "struct A { int n; A(int m) : n(m) {} int get() const __private { return n; } };"


GOOD = """
template <typename T, int N> inline T f(const device T* x, thread T& a, threadgroup half4* b, constant const int* c) {
  thread T* p = &a; const device uint4* q = (const device uint4*)x; return a * N + T(c[0] * N) + x[N] * a; }
struct S { int n; }; inline int g(thread const S& s) { int size = 3; return size * s.n & size; }
"""


def test_qualified_pointers_pass():
    check_qualifiers(GOOD)


@pytest.mark.parametrize(
    ("old", "new"),
    [("const device T* x", "const T* x"), ("thread T& a", "T& a"), ("thread T* p", "T* p"), ("thread const S& s", "const S& s"),
     ("threadgroup half4* b", "half4* b"), ("constant const int* c", "const int* c")],
)  # fmt: skip
def test_pointers_without_a_space_do_not(old, new):
    assert old in GOOD
    with pytest.raises(RefusedError, match="without an address space"):
        check_qualifiers(GOOD.replace(old, new))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int f(int x) { auto g = [&](int y) { return x + y; }; return g(1); }", "no lambda"),
        ("void f() { goto end; end: return; }", "no goto"),
        ("void f() { threadgroup float a[4]; }", "threadgroup memory outside a kernel"),
    ],
)
def test_what_metal_lacks(text, message):
    with pytest.raises(RefusedError, match=message):
        check_metal(f"{text}\n[[kernel]] void k() {{ threadgroup float b[4]; }}")


def test_instrumented_ir():
    ir = """define void @f(ptr addrspace(1) %0) {
  %2 = load <4 x i32>, ptr addrspace(1) %0, align 16
  store float %x, ptr addrspace(3) @a, align 4
  %3 = load float, ptr %local, align 4
  call void @llvm.memcpy.p1.p0.i64(ptr addrspace(1) align 4 %0, ptr align 4 %local, i64 12, i1 false)
}
"""
    lines = [line.strip() for line in instrument(ir, ()).splitlines()]
    assert lines[1] == "call void @emulator_access(ptr %0, i64 16, i32 16, i32 1, i32 0)"
    assert lines[2] == "%2 = load <4 x i32>, ptr %0, align 16"
    assert lines[3] == "call void @emulator_access(ptr @a, i64 4, i32 4, i32 3, i32 1)"
    assert lines[6] == "call void @emulator_access(ptr %0, i64 12, i32 4, i32 1, i32 1)"
    assert "@llvm.memcpy.p0.p0.i64(" in lines[7]


@pytest.mark.parametrize(
    "line",
    [
        "  %2 = addrspacecast ptr addrspace(1) %0 to ptr",
        "  %2 = fmul double %0, %1",
        "  %2 = fpext float %0 to double",
        "  %2 = sitofp i32 %0 to double",
        "  %2 = atomicrmw add ptr addrspace(1) %0, i32 1 seq_cst, align 4",
        "  %2 = load atomic i32, ptr addrspace(1) %0 seq_cst, align 4",
        "  %2 = call <4 x float> @llvm.masked.load.v4f32.p1(ptr addrspace(1) %0, i32 4, <4 x i1> %1, <4 x float> zeroinitializer)",
        "  %2 = load %struct.S, ptr addrspace(1) %0, align 4",
    ],
)
def test_ir_that_is_refused(line):
    with pytest.raises(RefusedError):
        instrument(f"define void @f() {{\n{line}\n}}\n", ())


def test_small_inputs_are_constant_and_shapes_are_passed_when_named():
    body = "y[0] = T(x_shape[1] + z_ndim + z_strides[0]) + s + few[6] + z[0];"
    few = np.arange(7, dtype=np.float32)
    inputs = {
        "x": np.zeros((2, 5), np.float32),
        "z": np.full((2, 3, 4), 2, np.float32),
        "s": np.float32(100),
        "few": few,
    }
    made = launch(body, inputs, {"y": ((1,), "float32")}, grid=(1, 1, 1), T="float32")
    _, parameters = signature(generated_text(made))
    spaces = {p.name: (p.space, p.mark) for p in parameters}
    assert spaces == {
        "x": ("device", "*"), "x_shape": ("constant", "*"), "z": ("device", "*"), "z_strides": ("constant", "*"),
        "z_ndim": ("constant", "&"), "s": ("constant", "&"), "few": ("constant", "*"), "y": ("device", "*"),
    }  # fmt: skip
    assert float(emulate(made)[0][0]) == 5 + 3 + 12 + 100 + 6 + 2


def test_the_runner_takes_and_gives_mlx_arrays():
    import mlx.core as mx

    x = np.arange(32).astype(ml_dtypes.bfloat16)
    body = "uint i = thread_position_in_grid.x; y[i] = T(float(x[i]) * 0.5);"
    arrays = {"x": mx.arange(32).astype(mx.bfloat16)}
    (y,) = runner(launch(body, arrays, {"y": ((32,), "bfloat16")}, T="bfloat16"))
    assert y.dtype == mx.bfloat16
    np.testing.assert_array_equal(np.array(y.astype(mx.float32)), x.astype(np.float32) / 2)
