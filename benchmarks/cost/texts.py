"""The kernels' texts, as MLX would give them to a Metal compiler, and the LLVM IR that clang makes of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from bitnet_mlx.backends.kernels.launch import Launch
from tests.emulator import compiler, trace

# As a compiler for Apple's GPUs would, whose registers have 32 bits and no vectors: no vectors but the text's, no index
# widened to 64 bits. No loop is unrolled but those with a constant number of passes.
FLAGS = tuple(
    (
        "-O2 -ffp-contract=on -fno-vectorize -fno-slp-vectorize -mllvm -unroll-threshold=100000 -mllvm -unroll-runtime=0 "
        "-mllvm -unroll-allow-partial=0 -mllvm -indvars-widen-indvars=false"
    ).split()
)
_INSTANTIATION = re.compile(r"^template \[\[host_name\(.*?\)\]\] \[\[kernel\]\] ", re.M)
_KERNEL = re.compile(r"\[\[kernel\]\] void (\w+)\(")


@dataclass(frozen=True)
class Text:
    """metal: the text after MLX's utils.h. symbol: a part of the kernel's name that no other function has."""

    metal: str
    symbol: str

    def edited(self, edit: Callable[[str], str]) -> Text:
        """The same with another text."""
        return Text(edit(self.metal), self.symbol)


def ours(launch: Launch) -> Text:
    """A kernel of metal_kernels."""
    return _printed(trace.generated_text(launch))


def _printed(metal: str) -> Text:
    return Text(metal, _KERNEL.findall(metal)[0])


@lru_cache(maxsize=1)
def mlx_lm() -> Text:
    """The kernel of mlx-lm's BitLinear as the installed package makes it, for float16 activations."""
    import mlx.core as mx
    from mlx_lm.models import bitlinear_layers

    size = 2560
    kernel = bitlinear_layers.make_bitlinear_kernel()

    def call(x: mx.array, weight: mx.array, scale: mx.array) -> Any:
        template = [("T", mx.float16), ("invert_weight_scales", True), ("in_features", size), ("out_features", size)]
        return kernel(
            inputs=[x, weight, scale],
            template=template,
            grid=(32, size // 4, 1),
            threadgroup=(32, 1, 1),
            output_shapes=[(1, size)],
            output_dtypes=[mx.float16],
            verbose=True,
            stream=mx.gpu,
        )[0]

    arrays = (mx.zeros((1, size), mx.float16), mx.zeros((size // 4, size), mx.uint8), mx.zeros((1,), mx.float16))
    return _printed(trace.printed_text(call, *arrays))


def stock_qmv(dtype: str, group: int = 128) -> Text:
    """MLX's affine_qmv_fast for 2 bits, of the header in the installed wheel; groups of 128, no batch."""
    kernel = f"affine_qmv_fast<{dtype}, {group}, 2, false, false>"
    includes = "".join(f'#include "mlx/backend/metal/kernels/{name}.h"\n' for name in STOCK_HEADERS)
    return Text(f"{includes}template decltype({kernel}) {kernel};\n", "affine_qmv_fast")


STOCK_HEADERS = ("steel/gemm/gemm", "quantized_utils", "quantized")


@lru_cache(maxsize=64)
def ir(text: Text) -> str:
    """Unvectorised LLVM IR of a text, in memory of real address spaces. Raises RefusedError if clang does not take it."""
    return compiler.ir(_INSTANTIATION.sub("template ", text.metal), FLAGS)


def zeros(shape: tuple[int, ...], dtype: str) -> Any:
    """An array of any dtype that kernels take."""
    import mlx.core as mx

    from bitnet_mlx.backends.kernels.run import DTYPES

    return mx.zeros(shape, DTYPES[dtype])
