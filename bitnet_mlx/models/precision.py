"""Precision policy: one small table a model, and what each engine makes of it.

The body is ternary whatever the policy; its products are exact in int8 activations. Norms compute and keep float32.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from bitnet_mlx.errors import ConfigError
from bitnet_mlx.models.config import DecoderConfig

KV_BITS = (16, 8, 4)
_ON_MLX = ("metal", "cuda", "mlx")


@dataclass(frozen=True)
class PrecisionPolicy:
    """head_bits: of embedding and head; None as in the file. kv_bits: of the KV cache; None is dtype's own. dtype: of what
    passes between layers; None lets the engine choose. activations: 8 or 16 bits into ternary layers; None is the model's.
    """

    name: str = "custom"
    head_bits: int | None = None
    kv_bits: int | None = None
    dtype: str | None = None
    activations: int | None = None
    body: str = "ternary"
    norm_dtype: str = "float32"

    def replaced(self, **given: object) -> PrecisionPolicy:
        """With those of head_bits, kv_bits, dtype and activations that are not None: a flag goes before the preset."""
        known = ("head_bits", "kv_bits", "dtype", "activations")
        told = {key: value for key, value in given.items() if key in known and value is not None}
        return replace(self, **told) if told else self  # type: ignore[arg-type]

    def table(self) -> dict[str, str]:
        """In words, row by row."""
        return {
            "body": self.body,
            "head": "as in the file" if self.head_bits in (None, 16) else f"{self.head_bits} bits in groups of 64",
            "kv cache": "the activations' dtype" if self.kv_bits is None else f"{self.kv_bits} bits",
            "norms": self.norm_dtype,
            "activations": self.dtype or "the engine's choice",
            "into ternary layers": "the model's own" if self.activations is None else f"{self.activations} bits",
        }

    def record(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


PRESETS = {
    "memory": PrecisionPolicy("memory", head_bits=4, kv_bits=8),
    "balanced": PrecisionPolicy("balanced", head_bits=8, kv_bits=16),
    "accuracy": PrecisionPolicy("accuracy", dtype="float32"),
}


def policy(name: str | None) -> PrecisionPolicy:
    """A preset by its name; None changes nothing. Raises ConfigError for a name that does not exist."""
    if name is None:
        return PrecisionPolicy()
    if name not in PRESETS:
        raise ConfigError(f"[precision] {name!r} was asked for; {', '.join(PRESETS)} are known")
    return PRESETS[name]


def for_engine(wanted: PrecisionPolicy, engine: str) -> tuple[PrecisionPolicy, tuple[str, ...]]:
    """(what the engine does, in words what it does not). For presets; a flag that an engine cannot honour is an error.

    cpu and numpy hold a head's code in a byte whatever its bits, so fewer than 8 would cost accuracy for nothing.
    """
    if engine in _ON_MLX:
        return wanted, ()
    notes = []
    if wanted.kv_bits is not None:
        notes.append(f"{engine} keeps keys and values in float32")
    if wanted.head_bits is not None and wanted.head_bits < 8:
        notes.append(f"{engine} holds each code of the head in a byte, so it takes 8 bits, not {wanted.head_bits}")
    head = wanted.head_bits if wanted.head_bits is None else max(wanted.head_bits, 8)
    return replace(wanted, kv_bits=None, head_bits=head), tuple(notes)


def check_kv_bits(kv_bits: int | None, engine: str, config: DecoderConfig | None = None) -> None:
    """Raise ConfigError for bits that do not exist, an engine that has float32 alone, or heads that do not divide."""
    if kv_bits is None:
        return
    if kv_bits not in KV_BITS:
        raise ConfigError(f"[kv] kv_bits is {kv_bits!r}; {', '.join(map(str, KV_BITS))} are allowed")
    if engine not in _ON_MLX:
        raise ConfigError(
            f"[kv] kv_bits is {kv_bits} and the backend is {engine}, which keeps keys and values in float32; "
            "leave it out, or take metal, cuda or mlx"
        )
    if config is not None and kv_bits < 16:
        from bitnet_mlx.models.demand import kv_group

        kv_group(config.head_dim)
