"""The text that MLX's CUDA back end makes of a launch, and what NVIDIA's compiler says about it.

MLX prints that text only on a machine with a GPU, so its layout is stated here again: MLX's header, ours, a function
whose arguments are the inputs (each followed by its shape where the body says `name_shape`, unless it is a scalar) and
the outputs, the template's values as constants and type names, and the body.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bitnet_mlx.backends.kernels.launch import Launch, Value
from bitnet_mlx.backends.kernels.source import read

NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
ARCHITECTURE = "sm_90a"  # MLX names the processor it finds; this one is an H100's
STUBS = Path(__file__).with_name("nvcc")
NO_GROUPS = STUBS / "no_groups"  # a header of CUDA's that MLX names and no kernel of ours uses: most of nvcc's work
_met: set[str] = set()  # the kernels that were compiled with the true one
TYPES = {
    "float32": "float",
    "float16": "__half",
    "bfloat16": "__nv_bfloat16",
    "int8": "int8_t",
    "int32": "int32_t",
    "uint32": "uint32_t",
    "uint8": "uint8_t",
}
_MLX_HEADER = '#include "mlx/backend/cuda/device/utils.cuh"\n\n#include <cooperative_groups.h>\n\n'
_USED = re.compile(r"ptxas info\s+: Used (\d+) registers.*?(?:(\d+) bytes smem)?")
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")


@dataclass(frozen=True)
class Report:
    """What ptxas says of a kernel: registers a thread; bytes of stack and of spilled registers a thread."""

    registers: int
    stack: int
    spills: int


def name(launch: Launch) -> str:
    """The kernel's name within the text."""
    return f"custom_kernel_{launch.source.name}"


def text(launch: Launch, instead: tuple[tuple[str, str], ...] = ()) -> str:
    """The whole CUDA text of a launch of numpy arrays. instead: headers of ours to replace, by name, with a text."""
    source = launch.source
    header = source.header_text("cuda")
    for file, replacement in instead:
        header = header.replace(read(file), replacement)
    body = source.body_text()
    arguments = []
    for argument, array in zip(source.inputs, launch.inputs, strict=True):
        arguments.append(f"const {TYPES[np.asarray(array).dtype.name]}* {argument}")
        if has_shape(body, argument, array):
            arguments.append(f"const __grid_constant__ Shape {argument}_shape")
    for argument, (_, dtype) in zip(source.outputs, launch.outputs, strict=True):
        arguments.append(f"{TYPES[dtype]}* {argument}")
    constants = "".join(_constant(key, value) for key, value in launch.template)
    return (
        f"{_MLX_HEADER}{header}namespace mlx::core::cu {{\n\nnamespace cg = cooperative_groups;\n\n"
        f"__global__ void {name(launch)}(\n    {f',{chr(10)}    '.join(arguments)}) {{\n{constants}\n{body}\n}}\n\n"
        "} // namespace mlx::core::cu\n"
    )


def has_shape(body: str, argument: str, array: object) -> bool:
    """Whether MLX passes the argument's shape: the body has the word (or a longer one that ends so), no scalar."""
    return f"{argument}_shape" in body and np.ndim(array) > 0


def _constant(key: str, value: Value) -> str:
    if isinstance(value, bool):
        return f"  constexpr bool {key} = {str(value).lower()};\n"
    if isinstance(value, int):
        return f"  constexpr int {key} = {value};\n"
    return f"  using {key} = {TYPES[value]};\n"


def compile_cuda(launch: Launch, folder: Path) -> Report:
    """Compile for an H100 with nvcc; what does not compile is an AssertionError with nvcc's words.

    The first text of each kernel meets all of CUDA's headers.
    """
    assert NVCC is not None
    includes = [f"-I{STUBS}"] + [f"-I{NO_GROUPS}"] * (launch.source.name in _met)
    source, binary = folder / "kernel.cu", folder / "kernel.cubin"
    source.write_text(text(launch), encoding="utf-8")
    command = [NVCC, "-std=c++17", f"-arch={ARCHITECTURE}", "-cubin", "-Xptxas=-v", *includes, "-o", binary, source]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, f"{launch.source.name}: nvcc says\n{found.stderr}"
    _met.add(launch.source.name)
    used, frame = _USED.search(found.stderr), _FRAME.search(found.stderr)
    assert used is not None and frame is not None, f"nvcc's report has no line about registers:\n{found.stderr}"
    return Report(int(used[1]), int(frame[1]), int(frame[2]) + int(frame[3]))


def sass(folder: Path) -> list[str]:
    """The machine instructions of what compile_cuda left in the folder."""
    tool = shutil.which("cuobjdump") or str(Path(NVCC or "").with_name("cuobjdump"))
    found = subprocess.run([tool, "-sass", folder / "kernel.cubin"], capture_output=True, text=True, check=True)
    return re.findall(r"/\*[0-9a-f]{4,5}\*/\s+([^;]+);", found.stdout)
