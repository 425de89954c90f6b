"""Several processes that train one model: what each finds is gathered, and summed by all in the same order.

mx.distributed carries it: `ring` (sockets, on a CPU or on Macs) or `nccl` (NVIDIA GPUs), as `mlx.launch` sets them up. A sum
in the order of ranks is that of one process which takes the same batches one after another, to the last bit on a CPU; an
all-reduce, whose order is the network's, would not be.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map

from bitnet_mlx.errors import ConfigError, TrainError
from bitnet_mlx.train.optimizer import State

LAUNCHED = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")  # set by mlx.launch and by mpirun
BACKENDS = (("ring", "MLX_HOSTFILE"), ("nccl", "NCCL_HOST_IP"))  # and what a launcher sets for each
Tree = Any  # dictionaries of arrays, nested


class Group:
    """This process alone: rank 0 of 1."""

    rank, size = 0, 1

    def in_order(self, found: Tree) -> list[Tree]:
        """What every rank found, rank 0 first: a tree of float32 arrays."""
        return [found]

    def any(self, value: bool) -> bool:
        """Whether it is so on any rank."""
        return value

    def from_first(self, step: int, state: State) -> tuple[int, State]:
        """Rank 0's step and state, for all."""
        return step, state

    def check_same(self, facts: dict[str, Any]) -> None:
        """Raise ConfigError where the ranks were told different things."""


class Ranks(Group):
    """One of several processes. patience: seconds that one may wait for another before it gives up."""

    def __init__(self, group: Any, patience: float) -> None:
        self._group, self._patience = group, patience
        self.rank, self.size = group.rank(), group.size()

    def in_order(self, found: Tree) -> list[Tree]:
        flat: Any = tree_flatten(found)
        arrays = [array for _, array in flat]
        rows = self._gather(mx.concatenate([array.reshape(-1) for array in arrays]))
        ends = np.cumsum([array.size for array in arrays]).tolist()
        pieces: list[Any] = [mx.split(rows[rank], ends[:-1]) for rank in range(self.size)]
        return [_filled(found, own) for own in pieces]

    def any(self, value: bool) -> bool:
        return bool(self._gather(mx.array([float(value)])).max().item())

    def from_first(self, step: int, state: State) -> tuple[int, State]:
        first = self.in_order({"state": state, "step": mx.array(float(step))})[0]  # exact up to 2^24
        mx.eval(first)
        return int(first["step"].item()), first["state"]

    def check_same(self, facts: dict[str, Any]) -> None:
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).digest()
        rows = np.array(self._gather(mx.array(np.frombuffer(digest, np.uint8).astype(np.float32))))
        other = np.flatnonzero((rows != rows[0]).any(axis=1))
        if len(other):
            raise ConfigError(
                f"[distributed] rank {other[0]} was given other options or other data than rank 0; all ranks need the same"
            )

    def _gather(self, x: mx.array) -> mx.array:
        """x [n] of every rank -> [ranks, n]."""
        mx.eval(x)  # only the wait for others is timed
        with _Patience(self._patience, self.rank):
            try:
                rows = mx.distributed.all_gather(x[None], group=self._group)
                mx.eval(rows)
            except RuntimeError as error:
                raise TrainError(
                    f"[distributed] rank {self.rank} of {self.size} lost another rank ({error}); the last checkpoint stays: "
                    "start all ranks again with --resume"
                ) from error
        return rows


def _filled(tree: Tree, pieces: Sequence[mx.array]) -> Tree:
    """A tree of the shapes of `tree` with the values of flat pieces, in its order."""
    rest = iter(pieces)
    return tree_map(lambda like: next(rest).reshape(like.shape), tree)


def _text(rank: int, seconds: float) -> str:
    return (
        f"error: [distributed] rank {rank} waited {seconds:g} s for another rank; it may have stopped, or --rank-timeout is "
        "too short. The last checkpoint stays: start all ranks again with --resume\n"
    )


class _Patience:
    """Ends the process if what is inside takes too long: MLX waits for a silent peer without end, out of Python's reach."""

    def __init__(self, seconds: float, rank: int) -> None:
        self._timer = threading.Timer(seconds, self._give_up, (_text(rank, seconds),))
        self._timer.daemon = True

    def _give_up(self, text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()
        os._exit(1)

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, *error: object) -> None:
        self._timer.cancel()


# The same from another process: as a group forms, MLX lets no thread of this one run. It ends when its input does.
_GUARD = """
import os, select, signal, sys
seconds, process, text = sys.argv[1:]
if not select.select([0], [], [], float(seconds))[0]:
    sys.stderr.write(text)
    os.kill(int(process), signal.SIGTERM)
"""


@contextmanager
def _guarded(seconds: float, rank: int) -> Iterator[None]:
    command = [sys.executable, "-S", "-c", _GUARD, str(seconds), str(os.getpid()), _text(rank, seconds)]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as guard:
        try:
            yield
        finally:
            assert guard.stdin is not None
            guard.stdin.close()


def join(patience: float, environment: Callable[[str], str | None] = os.environ.get) -> Group:
    """The group that a launcher has started this process in, or a group of one. Raises TrainError where it cannot form,
    ConfigError where an NCCL rank sees several GPUs."""
    if not any(environment(name) is not None for name in LAUNCHED):
        return Group()
    backend = next((name for name, variable in BACKENDS if environment(variable) is not None), "any")
    # MLX computes and communicates on the first GPU that it sees, but joins NCCL's group as GPU number rank.
    if backend == "nccl" and (gpus := mx.device_count(mx.gpu)) > 1:
        raise ConfigError(
            f"[distributed] this process sees {gpus} GPUs, and with NCCL each takes one; start all with mlx.launch --backend nccl, "
            "or give each rank its own in CUDA_VISIBLE_DEVICES"
        )
    try:
        with _guarded(patience, int(environment("MLX_RANK") or 0)):
            group = mx.distributed.init(strict=True, backend=backend)
    except RuntimeError as error:
        raise TrainError(
            f"[distributed] the ranks could not find one another: {error}; start all with mlx.launch"
        ) from error
    return Ranks(group, patience) if group.size() > 1 else Group()
