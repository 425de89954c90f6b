"""Addresses and scratch memory of the cpu decoder: what backends/cpu_jit/layout.py describes, filled from DecoderWeights."""

from __future__ import annotations

import numpy as np

from bitnet_mlx.backends.cpu_jit import layout as at
from bitnet_mlx.backends.low_rank import LowRank
from bitnet_mlx.backends.numpy_ref import LANES
from bitnet_mlx.formats.dense import DenseRows, GroupedRows
from bitnet_mlx.models.config import DecoderConfig
from bitnet_mlx.models.weights import DecoderWeights, Linear, Matrix
from bitnet_mlx.ternary import TernaryTensor, padded

LINEAR_NAMES = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
NORM_NAMES = (
    "input_layernorm", "self_attn.attn_sub_norm", "post_attention_layernorm", "mlp.ffn_sub_norm",
    "self_attn.q_norm", "self_attn.k_norm",
)  # fmt: skip
_LINE = 64  # bytes of a cache line


def address(array: np.ndarray) -> int:
    """Where an array's first element lies."""
    return array.ctypes.data


class WeightTables:
    """The tables of linears and norms, and references to every array that they point to."""

    def __init__(self, weights: DecoderWeights) -> None:
        config = weights.config
        self.config = config
        self._kept: list[np.ndarray] = []
        layers = config.num_hidden_layers
        self.linears = np.zeros((layers * at.LAYER_LINEARS + 1, at.FIELDS), np.int64)
        self.norms = np.zeros(layers * at.LAYER_NORMS + 1, np.int64)
        sizes = config.norm_sizes()
        for layer in range(layers):
            for i, name in enumerate(LINEAR_NAMES):
                self._fill(self.linears[layer * at.LAYER_LINEARS + i], weights.layer_linear(layer, name))
            for i, name in enumerate(NORM_NAMES):
                if name in sizes:
                    self.norms[layer * at.LAYER_NORMS + i] = self._floats(weights.layer_norm(layer, name))
        self._fill(self.linears[-1], Linear(weights.lm_head), head=True)
        self.norms[-1] = self._floats(weights.norms["model.norm"])
        scale = 1 / np.sqrt(config.head_dim)
        self.scalars = np.array([config.rms_norm_eps, scale, config.linear_norm_eps], np.float32)

    def describe(self, state: np.ndarray) -> None:
        """Write the model's own slots of the state."""
        c = self.config
        state[at.LAYERS], state[at.HIDDEN], state[at.HEADS] = c.num_hidden_layers, c.hidden_size, c.num_attention_heads
        state[at.KV_HEADS], state[at.HEAD_DIM] = c.num_key_value_heads, c.head_dim
        state[at.FFN], state[at.SILU] = c.intermediate_size, c.hidden_act == "silu"
        state[at.LINEARS], state[at.NORMS] = address(self.linears), address(self.norms)
        state[at.SCALARS] = address(self.scalars)

    def _floats(self, array: np.ndarray) -> int:
        """Address of a float32 array; a copy is kept only where it is not contiguous or lies at an odd address."""
        return self._keep(np.require(array, np.float32, ["C", "A"]))

    def _keep(self, array: np.ndarray) -> int:
        self._kept.append(array)
        return address(array)

    def _fill(self, fields: np.ndarray, linear: Linear, head: bool = False) -> None:
        weight = linear.weight
        fields[at.N], fields[at.WIDTH] = weight.shape
        data, scale = self._storage(fields, weight, head)
        fields[at.ROW_BYTES] = data.strides[0]
        fields[at.DATA] = self._keep(data)
        if scale is not None:
            fields[at.SCALE] = self._floats(scale)
            fields[at.SCALE_GROUPS] = scale.shape[1] if scale.ndim == 2 else 1
            fields[at.SCALE_STEP] = fields[at.SCALE_GROUPS] if scale.ndim else 0
        late = linear.adapter is not None
        fields[at.LATE_BIAS if late else at.BIAS] = 0 if linear.bias is None else self._floats(linear.bias)
        fields[at.NORM] = 0 if linear.norm is None else self._floats(linear.norm)
        if linear.adapter is not None:
            self._fill_adapter(fields, linear.adapter)

    def _fill_adapter(self, fields: np.ndarray, part: LowRank) -> None:
        up = np.zeros((part.b.shape[1], lanes(part.rank)), np.float32)
        up[:, : part.rank] = part.b.T
        fields[at.RANK], fields[at.LOW_A], fields[at.LOW_B] = part.rank, self._floats(part.a.T), self._keep(up)
        fields[at.FACTOR] = self._keep(np.array([part.scale], np.float32))
        fields[at.GAIN] = 0 if part.gain is None else self._floats(part.gain)

    @staticmethod
    def _storage(fields: np.ndarray, weight: Matrix, head: bool) -> tuple[np.ndarray, np.ndarray | None]:
        """Set KIND; return the matrix as its rows lie in memory, and its scales. The head never quantises its input."""
        if isinstance(weight, TernaryTensor):
            fields[at.KIND] = at.TERNARY if weight.activation_bits == 8 and not head else at.TERNARY_FLOAT
            return np.ascontiguousarray(weight.words), weight.scale
        if isinstance(weight, GroupedRows):
            fields[at.KIND] = at.GROUPED
            return np.ascontiguousarray(weight.codes), weight.scales
        assert isinstance(weight, DenseRows)
        if weight.dtype == "bfloat16":
            fields[at.KIND] = at.BFLOAT16
            return np.ascontiguousarray(weight.data), None
        fields[at.KIND] = at.FLOAT32
        return np.ascontiguousarray(weight.data, np.float32), None


class Buffers:
    """Scratch memory of one decoder: one block, grown when a step needs more rows, positions or threads."""

    def __init__(self, config: DecoderConfig, normed: bool = False, rank: int = 0) -> None:
        """normed: whether a linear has a norm of its own, whose input needs a buffer. rank: the largest of an adapter."""
        self._config, self._normed, self._rank = config, normed, rank
        self._rows = self._positions = self._threads = 0
        self.block = np.zeros(0, np.uint8)

    def fit(self, state: np.ndarray, rows: int, positions: int, threads: int) -> None:
        """Make room, and write the buffers' addresses into the state where they moved."""
        total = self.resize(rows, positions, threads)
        if total is None:
            return
        sizes = self._sizes()
        scratch, scratch_bytes = self._scratch()
        self.block = np.zeros(total, np.uint8)
        here = address(self.block) + -address(self.block) % _LINE
        for slot, size in sizes.items():
            state[slot] = here
            here += _lines(size)
        state[at.SCRATCH], state[at.SCRATCH_BYTES] = here, scratch_bytes
        state[at.LOW_WIDTH] = lanes(self._rank)
        for slot, offset in scratch.items():
            state[slot] = offset

    def resize(self, rows: int, positions: int, threads: int) -> int | None:
        """Bytes that the block needs from now on, or None where it is large enough. Nothing is allocated."""
        if rows <= self._rows and positions <= self._positions and threads <= self._threads:
            return None
        if rows > self._rows:
            self._rows = at.CHUNK if rows > 8 else 8 if rows > 1 else 1
        self._positions = max(self._positions, 1024 * (-(-2 * positions // 1024)) if positions > self._positions else 0)
        self._threads = max(self._threads, threads)
        return sum(_lines(n) for n in self._sizes().values()) + self._scratch()[1] * self._threads + _LINE

    def _sizes(self) -> dict[int, int]:
        """Bytes of each buffer that all threads share."""
        c, rows = self._config, self._rows
        queries, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        widest = padded(max(c.hidden_size, queries, c.intermediate_size))
        return {
            at.X: rows * padded(c.hidden_size) * 4,
            at.PLAIN: rows * widest * 4,
            at.NORMED: rows * widest * 4 if self._normed else 0,
            at.CODES: -(-rows // 8) * 8 * widest,
            at.SUMS: rows * (widest // 128 + 1) * 4,
            at.SCALES: rows * 4,
            at.Q: rows * queries * 4,
            at.KEYS: rows * kv * 4,
            at.VALUES: rows * kv * 4,
            at.ATTENTION: rows * padded(queries) * 4,
            at.GATE: rows * padded(c.intermediate_size) * 4,
            at.UP: rows * padded(c.intermediate_size) * 4,
            at.LOW: 3 * rows * lanes(self._rank) * 4,
        }

    def _scratch(self) -> tuple[dict[int, int], int]:
        """Offsets of a thread's own areas, and their bytes together."""
        areas = {
            at.TILE_AT: at.TILE * 8 * 4,
            at.LANES_AT: at.HEAD_ROWS * 8 * LANES * 4,
            at.PLAIN_TILE_AT: self._rows * at.TILE * 4 if self._rank else 0,
            at.SCORES_AT: self._config.groups * self._positions * 4,
        }
        offsets, size = {}, 0
        for slot, area in areas.items():
            offsets[slot], size = size, size + _lines(area)
        return offsets, size


def lanes(rank: int) -> int:
    """A rank in whole lanes."""
    return -(-rank // LANES) * LANES


def _lines(size: int) -> int:
    return -(-size // _LINE) * _LINE
