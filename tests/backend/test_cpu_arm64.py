"""The ARM64 bodies cannot run here: their assembly is read instead, compiled from the same text by LLVM."""

from __future__ import annotations

import re

import llvmlite.binding as llvm
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
