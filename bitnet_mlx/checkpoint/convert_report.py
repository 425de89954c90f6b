"""A conversion told to people."""

from __future__ import annotations

from bitnet_mlx.checkpoint.convert import Conversion
from bitnet_mlx.checkpoint.report import size


def summary(done: Conversion) -> list[str]:
    """A few lines: what was written, how exact, how fast."""
    lines = [f"note: {notice}" for notice in done.notices]
    rate = done.bytes_in / max(done.seconds, 1e-9) / 1e6
    memory = "" if done.peak_memory_bytes is None else f", peak memory {size(done.peak_memory_bytes)}"
    lines += [
        f"{done.path}: {done.format}, {size(done.bytes_out)} from {size(done.bytes_in)} "
        f"in {done.seconds:.1f} s ({rate:.0f} MB/s){memory}",
        f"{done.parameters:,} parameters in {done.tensors} tensors, of them {done.ternary_parameters:,} ternary "
        f"at {done.bits_per_weight:.3f} bits; all of them read again and equal to the source",
    ]  # fmt: skip
    for name, text in (("zeros", "zeros"), ("relative_error", "relative error")):
        values = sorted((layer[name], module) for module, layer in done.layers.items() if name in layer)
        if values:
            (low, least), (high, most) = values[0], values[-1]
            lines.append(f"{text} from {low:.2%} ({least}) to {high:.2%} ({most})")
    return lines


def details(done: Conversion) -> list[str]:
    """A line for each ternary linear."""
    width = max(map(len, done.layers), default=0)
    return [f"{module:<{width}}  {_layer(layer)}" for module, layer in done.layers.items()]


def _layer(layer: dict[str, float]) -> str:
    low, high = layer["scale_min"], layer["scale_max"]
    scale = f"{low:.6g}" if low == high else f"{low:.6g} to {high:.6g}"
    error = f", relative error {layer['relative_error']:.2%}" if "relative_error" in layer else ""
    return f"zeros {layer['zeros']:.2%}, scale {scale}{error}"
