"""How much memory a server gives to keys and values: what the memory plan leaves of this machine."""

from __future__ import annotations

import re
from pathlib import Path

from bitnet_mlx.errors import ConfigError, MemoryLimitError
from bitnet_mlx.memory import plan
from bitnet_mlx.memory.machine import this_machine
from bitnet_mlx.memory.plan import Machine
from bitnet_mlx.memory.show import size
from bitnet_mlx.models.decoder import Decoder
from bitnet_mlx.models.demand import PROCESS, activations_of, demand, kv_of
from bitnet_mlx.models.owners import holdings

_SHARE = 0.5  # of what the plan leaves: other programs come and go
_PREFIX_SHARE = 0.25  # of that, for beginnings of prompts
_MOST_PREFIX = 2 << 30
_UNKNOWN = 1 << 30  # where the machine does not tell its memory
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


def parse_bytes(text: str, flag: str) -> int:
    """A number of bytes as mlx-lm writes it: 1000000, 512M, 1.5GB. Raises ConfigError naming the flag."""
    found = re.fullmatch(r"(\d{1,18}(?:\.\d{1,9})?) ?([KMG]?)B?", text.strip().upper(), re.ASCII)
    if found is None:
        raise ConfigError(
            f"[serve] {flag} is {text[:40]!r}; a number of bytes such as 800000000, 512M or 1.5GB is allowed"
        )
    return int(float(found[1]) * _UNITS[found[2]])


def kv_budget(
    decoder: Decoder, context: int, running: int, kv_bytes: int | None, prefix_bytes: int | None,
    machine: Machine | None = None,
) -> tuple[int, int]:  # fmt: skip
    """(bytes of keys and values of texts that run, bytes of beginnings that are kept), what is None from the plan.

    The first is no more than `running` texts of `context` positions can come to use. Raises ConfigError for room for not
    a single position, MemoryLimitError where the machine has none left.
    """
    need = kv_of(decoder)
    if kv_bytes is not None and kv_bytes < need(1, 1):
        raise ConfigError(
            f"[serve] --max-kv-bytes is {kv_bytes}, which has room for no position: one takes {need(1, 1)} bytes; give more"
        )
    left = _left(decoder, context, running, machine or this_machine(decoder.name))
    prefixes = min(int(left * _SHARE * _PREFIX_SHARE), _MOST_PREFIX) if prefix_bytes is None else prefix_bytes
    if kv_bytes is None:
        kv_bytes = int(left * _SHARE) - (prefixes if prefix_bytes is None else 0)
        if kv_bytes < need(1, 1):
            raise MemoryLimitError(
                f"[serve] {size(left)} of memory are left beside the model; keys and values need more; free some, or take the "
                "risk with --max-kv-bytes"
            )
    return min(kv_bytes, need(context, running)), prefixes


def check_room(path: Path, name: str, backend: str) -> None:
    """Raise MemoryLimitError where the plan says that the model, with one position of cache, does not fit what is free now."""
    from bitnet_mlx.checkpoint.weigh import model_size

    machine = this_machine(backend)
    needed = plan.make_plan(demand(model_size(path, name), backend), machine, 1).needed
    free = machine.available if machine.working_set is None else machine.working_set
    if free is not None and needed > free:
        raise MemoryLimitError(
            f"[serve] {name} takes {size(needed)} and {size(free)} are free; free some, or take a smaller one"
        )


def _left(decoder: Decoder, context: int, running: int, machine: Machine) -> int:
    """Bytes that the plan leaves beside the loaded model and what its steps need, and that are free now."""
    room = plan.budget(machine, decoder.name)
    working = activations_of(decoder)(context, running)
    held = holdings(decoder)
    rooms = [] if room is None else [room - PROCESS[decoder.name] - held["weights"] - held["head"] - working]
    if machine.available is not None and machine.working_set is None:
        rooms.append(machine.available - working)
    return max(min(rooms), 0) if rooms else _UNKNOWN
