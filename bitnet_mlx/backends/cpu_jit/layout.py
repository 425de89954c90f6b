"""What the compiled step finds where: one int64 array, `state`, of sizes and addresses, and the tables it points to.

Weights stay where they lie, so every tensor is an address here; the decoder keeps the arrays themselves alive.
Widths of float buffers and of codes are padded to whole blocks of 128 elements; the padding holds zeros.
"""

from __future__ import annotations

# What is being done now. COUNTER hands out items to threads and has a cache line of its own (slots 8 to 15).
JOB, LAYER, ITEMS, GRAIN, INPUT, INPUT_STRIDE, K = range(7)
COUNTER = 8
WEIGHT, WANTS, SERIAL_BELOW, WHICH, NORM_EPS = range(26, 31)
# The model.
LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, SILU, LINEARS, NORMS, SCALARS = range(16, 26)
# This call.
ROWS, TOKENS, THREADS, POSITIONS, CACHES, COS, SIN, CHOSEN, CHOSEN_ROWS, LOGITS, SEQUENCES, TEAM = range(32, 44)
# Where the end of each job is noted (0: nowhere), how many are noted, and how many there is room for.
MARKS, MARKED, MARKS_ROOM = range(44, 47)
# Buffers.
X, PLAIN, CODES, SUMS, SCALES, Q, KEYS, VALUES, ATTENTION, GATE, UP = range(48, 59)
SCRATCH, SCRATCH_BYTES, TILE_AT, SCORES_AT, NORMED = range(59, 64)
# Adapters: x A [3, rows, LOW_WIDTH], the linear it begins with, and the input; a thread's tile before its adapter.
LOW, LOW_WIDTH, LOW_FIRST, LOW_INPUT, LOW_STRIDE, PLAIN_TILE_AT = range(64, 70)
LANES_AT = 70  # in a thread's scratch memory: the sums of panels.py
STATE_SIZE = 72

# Jobs.
PREPARE, QKV, ROTATE, ATTEND, OUT, GATE_UP, DOWN, FINAL_NORM, HEAD, SINGLE, GATED = range(11)
ENTER = 11  # no job: the mark of a compiled step's first moment
DOWN_RANK = 12  # x A of adapters

# A mark: int64 [MARK_FIELDS], the job (SINGLE and DOWN_RANK: plus MARK_WHICH times the linear), its layer, and when it ended in
# nanoseconds of clock.now().
MARK_FIELDS, MARK_WHICH = 3, 16

# A linear: int64 [FIELDS] each; a layer has seven, in this order; the head comes after the last layer.
# NORM: address of the weight of the norm that the linear has of its own, or 0.
KIND, N, WIDTH, ROW_BYTES, DATA, SCALE, SCALE_STEP, SCALE_GROUPS, BIAS, NORM = range(10)
# An adapter: its rank (0: none), A^T [rank, WIDTH], B^T [N, rank in whole lanes], the addresses of its factor, of its
# gain [N] (0: none) and of the linear's bias (0: none), which is added last; BIAS is 0 then.
RANK, LOW_A, LOW_B, FACTOR, GAIN, LATE_BIAS = range(10, 16)
FIELDS = 16
Q_PROJ, K_PROJ, V_PROJ, O_PROJ, GATE_PROJ, UP_PROJ, DOWN_PROJ = range(7)
LAYER_LINEARS = 7

# Kinds of linear. SCALE_STEP: floats between the scales of two rows (0: one scale for all); SCALE_GROUPS: scales a row.
TERNARY, TERNARY_FLOAT, FLOAT32, BFLOAT16, GROUPED = range(5)

# Norms of a layer: addresses of float32 vectors, 0 for none; the final norm comes after the last layer.
INPUT_NORM, OUT_NORM, FFN_NORM, DOWN_NORM, Q_NORM, K_NORM = range(6)
LAYER_NORMS = 6

# A sequence's cache: its capacity, then the addresses of keys and of values of each layer.
# SCALARS: float32 [eps, 1 / sqrt(head_dim), eps of norms inside linears]. POSITIONS, SEQUENCES: int64 [rows].
EPS, ATTENTION_SCALE, LINEAR_EPS = range(3)

TILE = 64  # rows of a weight that one item covers
PORTIONS = 4  # portions of tiles that a thread takes in a job of one row (measured: a tenth faster than tile by tile)
PANEL_FROM = 2  # rows of activations from which they are laid out in panels of 8
HEAD_ROWS, HEAD_GROUPS = 16, 8  # weight rows, and groups of 64, of a piece of a product of floats (panels.py)
K_TILE = 20  # blocks of a panel that stay in the first-level cache
CHUNK = 256  # rows of activations that one call takes at most
TEAMS = 4  # items of attention for each thread, at least, where heads can be split so far
SERIAL = 1 << 19  # default of SERIAL_BELOW: weights times rows below which a job is not worth waking threads for
