"""The ARM64 bodies, compiled from the same text by LLVM: their assembly is read, and they run on an emulated processor.

The emulated run takes qemu-aarch64 and aarch64-linux-gnu-gcc (Debian: qemu-user, gcc-aarch64-linux-gnu); where they are
missing it is skipped, and says so. Continuous integration installs them.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import llvmlite.binding as llvm
import pytest
from llvmlite import ir

from bitnet_mlx.backends.cpu_jit import arm64, plain
from bitnet_mlx.backends.cpu_jit.emit import i32, i64
from bitnet_mlx.backends.cpu_jit.product import emit_panel, emit_row


def module(body) -> ir.Module:
    """int32 row(w, x, blocks) and void panel(w, x, blocks, out)."""
    m = ir.Module()
    row = ir.Function(m, ir.FunctionType(i32, [i64] * 3), "row")
    b = ir.IRBuilder(row.append_basic_block("entry"))
    b.ret(emit_row(b, body, *row.args))
    panel = ir.Function(m, ir.FunctionType(ir.VoidType(), [i64] * 4), "panel")
    b = ir.IRBuilder(panel.append_basic_block("entry"))
    emit_panel(b, body, *panel.args)
    b.ret_void()
    return m


def machine(cpu: str, triple: str, features: str = "") -> llvm.TargetMachine:
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    return llvm.Target.from_triple(triple).create_target_machine(cpu=cpu, features=features, opt=3)


def optimised(body, target: llvm.TargetMachine) -> llvm.ModuleRef:
    parsed = llvm.parse_assembly(str(module(body)))
    parsed.triple = target.triple
    parsed.verify()
    builder = llvm.create_pass_builder(target, llvm.create_pipeline_tuning_options(speed_level=3))
    builder.getModulePassManager().run(parsed, builder)
    return parsed


def opcodes(text: str) -> list[str]:
    return re.findall(r"^\s+([a-z]+[a-z0-9.]*)\s", text, re.MULTILINE)


def test_the_dot_product_body_uses_the_instruction() -> None:
    for cpu, triple in (("apple-m1", "arm64-apple-macosx11.0.0"), ("neoverse-n1", "aarch64-unknown-linux-gnu")):
        target = machine(cpu, triple)
        used = opcodes(target.emit_assembly(optimised(arm64, target)))
        assert any(op.startswith("sdot") for op in used)
        assert not any(op.startswith(("smull", "smlal")) for op in used)


def test_the_plain_body_multiplies_in_vectors_without_it() -> None:
    target = machine("cortex-a72", "aarch64-unknown-linux-gnu")
    used = opcodes(target.emit_assembly(optimised(plain, target)))
    assert not any(op.startswith("sdot") for op in used)
    assert any(op.startswith(("mla", "smull", "smlal", "umlal")) for op in used)


EMULATOR, COMPILER = "qemu-aarch64", "aarch64-linux-gnu-gcc"
BODIES = {"sdot": (arm64, "neoverse-n1"), "plain": (plain, "cortex-a72")}


def emulated(body_name: str, folder: Path, broken: bool = False) -> subprocess.CompletedProcess[str]:
    """Link a body with the harness and run it. broken: the harness hands the planes of activations over in reverse."""
    body, cpu = BODIES[body_name]
    target = machine(cpu, "aarch64-unknown-linux-gnu")
    (folder / "body.o").write_bytes(target.emit_object(optimised(body, target)))
    harness = (Path(__file__).parent / "arm64_harness.c").read_text()
    if broken:
        harness = harness.replace("p = i % 4;", "p = 3 - i % 4;")
    (folder / "main.c").write_text(harness)
    subprocess.run([COMPILER, "-O1", "-static", "main.c", "body.o", "-o", "run"], cwd=folder, check=True)
    return subprocess.run([EMULATOR, "-cpu", "max", "./run"], cwd=folder, capture_output=True, text=True, check=False)


needs_emulator = pytest.mark.skipif(
    not (shutil.which(EMULATOR) and shutil.which(COMPILER)), reason=f"{EMULATOR} and {COMPILER} are not installed"
)


@needs_emulator
@pytest.mark.parametrize("body_name", list(BODIES))
def test_products_are_exact_on_an_emulated_processor(body_name: str, tmp_path: Path) -> None:
    done = emulated(body_name, tmp_path)
    assert done.stdout == "200 cases equal\n" and done.returncode == 0, done.stdout + done.stderr


@needs_emulator
def test_the_harness_sees_activations_in_another_order(tmp_path: Path) -> None:
    done = emulated("sdot", tmp_path, broken=True)
    assert done.returncode == 1 and done.stdout.startswith("wrong:")
