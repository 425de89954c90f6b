"""A profile as lines for a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from bitnet_mlx.profile.summary import Profile


def lines(profile: Profile) -> Iterator[str]:
    """The table of parts, and what it should be read with."""
    parts = profile.parts()
    moved = sum(part.bytes for part in parts.values())
    load = "" if profile.load_s is None else f"load {profile.load_s:.2f} s, "
    yield (
        f"[{profile.backend}] {load}first token {profile.first_token_s * 1e3:.1f} ms "
        f"({profile.prefill.tokens} tokens of prompt), a token {profile.token_s * 1e3:.3f} ms"
    )
    yield f"{'part':<10} {'ms':>9} {'share':>7} {'MB':>9} {'GB/s':>7} {'of copy':>8}"
    for name, p in parts.items():
        rate = f"{p.bandwidth / 1e9:7.2f} {p.of_copy:8.0%}" if p.bytes else f"{'-':>7} {'-':>8}"
        yield f"{name:<10} {p.seconds * 1e3:9.3f} {p.share:7.1%} {p.bytes / 1e6:9.2f} {rate}"
    whole = moved / profile.token_s
    yield (
        f"{'sum':<10} {profile.token_s * profile.coverage * 1e3:9.3f} {profile.coverage:7.0%} of the plain run; "
        f"{moved / 1e6:.2f} MB a token at {whole / 1e9:.2f} GB/s, {whole / profile.copy:.0%} of a copy's "
        f"{profile.copy / 1e9:.1f} GB/s"
    )
    steps = profile.decode or (profile.prefill,)
    same = "the same logits to the last bit" if profile.same else "logits that differ in rounding"
    yield f"{steps[-1].launches} {profile.launch_kind} a token; instruments on and off gave {same}"
    layers = profile.layers()
    if layers:
        sums = [sum(layer.values()) * 1e3 for layer in layers]
        slowest = max(range(len(sums)), key=lambda i: sums[i])
        yield f"layers: {len(sums)}, {min(sums):.3f} to {max(sums):.3f} ms each, the longest is layer {slowest}"
