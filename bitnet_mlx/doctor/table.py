"""The report for a reader."""

from __future__ import annotations

from bitnet_mlx.doctor.report import EngineReport, Machine, ProductReport, Report

_ROUNDS = (
    "float32: MLX rounds the inputs of float32 products to some 11 bits on this GPU; MLX_ENABLE_TF32=0 in the environment keeps\n"
    "  all 24. Ternary products are exact either way; attention, 16-bit activations and training are what it touches"
)

_EMULATES = (
    "bfloat16: this GPU computes it in other types (M1, M2). --dtype float16 avoids that for llama and qwen3 families; bitnet's\n"
    "  squared ReLU passes what float16 holds, and stays in bfloat16 or float32"
)


def table(report: Report) -> str:
    """Lines of at most some 120 characters."""
    here = report.machine
    lines = [
        f"bitnet-mlx {report.version}, Python {report.python} on {here.system} ({here.machine})",
        f"chip: {_chip(here)}",
        "packages: " + ", ".join(f"{name} {version or 'absent'}" for name, version in report.packages.items())
        + (f" (mlx is {here.mlx_from})" if here.mlx_from else ""),
        f"automatic choice: {report.chosen} ({report.reason})",
        *([] if here.keeps_float32 is not False else [_ROUNDS]),
        *([_EMULATES] if here.emulates_bfloat16 else []),
        "",
    ]  # fmt: skip
    for engine in report.engines:
        details = ", ".join(f"{key} {value}" for key, value in engine.details.items())
        lines.append(f"{engine.name:<6} {_verdict(engine)}" + (f" [{details}]" if details else ""))
    lines += ["", *_products(report.products)]
    if report.kernels:
        lines += ["", "kernels that take a row at a time, against the reference:"]
        lines += [f"  {kernel.name:<48} {kernel.text}" for kernel in report.kernels]
    if report.switched_off:
        lines += ["", "kernels of ours that are off here (stock MLX takes their place):"]
        lines += [f"  {off.name}: {off.reason}" for off in report.switched_off]
    wrong = "something is wrong on this machine: do not use what is marked, and report this"
    return "\n".join([*lines, "", "all engines and kernels agree" if report.ok else wrong])


def _chip(here: Machine) -> str:
    parts = [here.chip]
    if here.gpu_cores:
        parts.append(f"{here.gpu_cores} GPU cores")
    if here.memory_bytes:
        parts.append(f"{here.memory_bytes / 2**30:.1f} GiB of memory")
    if here.bandwidth:
        nominal = f" of nominally {here.nominal_bandwidth:.0f}" if here.nominal_bandwidth else ""
        parts.append(f"a copy moves {here.bandwidth:.1f} GB/s{nominal}")
    return ", ".join(parts)


def _products(products: list[ProductReport]) -> list[str]:
    """One line a product; the ratios are how many times as long stock MLX takes."""
    if not products:
        return []
    head = ("backend", "N x K", "M", "outputs", "us", "stock f32", "stock bf16", "of copy", "model", "kernel")
    rows = [head, *(_row(p) for p in products)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    kept = [i for i in range(len(head)) if any(row[i] for row in rows[1:])]
    return ["  ".join(row[i].ljust(widths[i]) for i in kept).rstrip() for row in rows]


def _row(p: ProductReport) -> tuple[str, ...]:
    return (
        p.backend,
        f"{p.n}x{p.k}",
        str(p.m),
        "exact" if p.exact else f"WRONG: {p.text}",
        f"{p.time:.1f}" if p.time else "",
        f"{p.to_float32:.2f}" if p.to_float32 else "",
        f"{p.to_bfloat16:.2f}" if p.to_bfloat16 else "",
        f"{p.share:.0%}" if p.share else "",
        f"{p.predicted:.0%}" if p.predicted else "",
        p.kernel or (f"stock: {p.reason}" if p.reason else ""),
    )


def _verdict(engine: EngineReport) -> str:
    if not engine.available:
        return f"absent: {engine.reason}"
    if engine.exact is None:
        return f"failed: {engine.reason}"
    if engine.exact:
        return "the reference's bits" if engine.name != "numpy" else "the reference"
    tokens = "the same tokens" if engine.same_tokens else "other tokens at near-ties"
    state = "close" if engine.ok else "WRONG"
    return f"{state}: within {engine.worst:.1e} of the logits' spread, {tokens}"
