"""Decode steps and prefill of the cpu engine at the layer shapes of bitnet-b1.58-2B-4T, against llama.cpp's TQ2_0.

    python benchmarks/bench_decode.py --peer llama.cpp [--peer-python PATH] [--record benchmarks/results/FILE.jsonl]

Both run with two threads each, in turns within one run, so that a noisy machine slows both; medians, p20 and p80 are
printed, on an idle machine and beside one busy process. The weights (104 MB in 6 layers) do not fit a cache. The peer is
a process of its own; the ratio is peer / ours, so more than 1 means that ours is faster. The last line is one JSON record.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from bitnet_mlx.backends.cpu_jit import isa, threads  # noqa: E402
from bitnet_mlx.bench.random_decoder import config_2b, random_decoder, ternary_weights  # noqa: E402
from bitnet_mlx.memory.system import processor  # noqa: E402
from bitnet_mlx.models.cache import KVCache  # noqa: E402
from bitnet_mlx.models.config import DecoderConfig  # noqa: E402
from bitnet_mlx.models.decoder_cpu import CpuDecoder  # noqa: E402

LAYERS, VOCAB, PAST, BURST, PREFILL = 6, 1024, 64, 8, 128
IDLE = 0.5  # load average up to which a machine is called idle
SMALL = 64  # vocabulary where the head should cost nothing
PAUSE = 0.05  # seconds between turns, for the other's threads to fall asleep
HELP = (
    "[bench] llama.cpp was asked for and {python} cannot import llama_cpp ({problem}); it takes a Python with "
    "llama-cpp-python (built for this processor) and gguf; make one and name it with --peer-python:\n"
    "  python3 -m venv .peer && .peer/bin/pip install gguf numpy && "
    "CMAKE_ARGS=-DGGML_NATIVE=ON .peer/bin/pip install --no-binary llama-cpp-python llama-cpp-python"
)


class Peer:
    """llama.cpp in a process of its own (peer_llama_cpp.py), asked for one timing at a time."""

    def __init__(self, python: str, model: Path, count: int) -> None:
        probe = subprocess.run([python, "-c", "import llama_cpp, gguf"], capture_output=True, text=True)
        if probe.returncode:
            lines = probe.stderr.strip().splitlines() or ["no message"]
            raise SystemExit(HELP.format(python=python, problem=lines[-1]))
        command = [python, str(ROOT / "benchmarks" / "peer_llama_cpp.py"), str(model), str(LAYERS), str(count)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def ask(self, request: str) -> Any:
        """Whatever JSON it answers."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(request + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"[bench] llama.cpp ended with status {self._process.wait()} on {request!r}")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


class Ours:
    """The same two measurements of the cpu decoder."""

    def __init__(self) -> None:
        self.config = config_2b(LAYERS, VOCAB)
        self.decoder = CpuDecoder(random_decoder(self.config, head_bits=16))
        self.cache = self.decoder.make_cache()

    def decode(self) -> list[float]:
        """Seconds of a burst of single-token steps."""
        return decode_times(self.decoder, self.cache, PAST, BURST)

    def prefill(self) -> float:
        """Seconds of one prompt."""
        self.cache.trim(0)
        tokens = [i % VOCAB for i in range(PREFILL)]
        start = time.perf_counter()
        self.decoder.step([tokens], [self.cache])
        return time.perf_counter() - start


def decode_times(decoder: CpuDecoder, cache: KVCache, past: int, count: int) -> list[float]:
    """Seconds of `count` single-token steps after `past` tokens."""
    cache.trim(past)
    if cache.offset < past:
        decoder.step([[i % SMALL for i in range(past - cache.offset)]], [cache])
    seconds = []
    for i in range(count):
        cache.trim(past)
        start = time.perf_counter()
        decoder.step([[i % SMALL]], [cache])
        seconds.append(time.perf_counter() - start)
    return seconds


def spread(seconds: list[float]) -> dict[str, float]:
    """p20, p50 and p80 in milliseconds."""
    low, middle, high = np.percentile(np.array(seconds) * 1e3, (20, 50, 80))
    return {"p20_ms": round(low, 3), "p50_ms": round(middle, 3), "p80_ms": round(high, 3), "runs": len(seconds)}


def read_bandwidth() -> Callable[[], float]:
    """A function that reads 256 MB on all threads and returns bytes a second."""
    import numba

    @numba.njit(parallel=True, fastmath=True)
    def read(words: Any) -> Any:
        total = 0
        for i in numba.prange(words.size):
            total += words[i]
        return total

    words = np.ones(1 << 25, np.int64)
    read(words)

    def measure() -> float:
        start = time.perf_counter()
        read(words)
        return words.nbytes / (time.perf_counter() - start)

    return measure


def compare(ours: Ours, peer: Peer | None, rounds: int, bandwidth: Callable[[], float]) -> dict[str, object]:
    """Take turns for `rounds` rounds; spreads of decode and prefill of both, and the bandwidth meanwhile."""
    times: dict[str, list[float]] = {"decode": [], "prefill": [], "peer decode": [], "peer prefill": []}
    rates = []
    for _ in range(rounds):
        times["decode"] += ours.decode()
        times["prefill"].append(ours.prefill())
        rates.append(bandwidth())
        if peer:
            time.sleep(PAUSE)
            times["peer decode"] += peer.ask(f"decode {PAST} {BURST}")
            times["peer prefill"].append(peer.ask(f"prefill {PREFILL}"))
            time.sleep(PAUSE)
    result: dict[str, object] = {name: spread(ts) for name, ts in times.items() if ts}
    result["read_gb_s"] = round(float(np.median(rates)) / 1e9, 2)
    for what in ("decode", "prefill"):
        if peer:
            result[f"{what} ratio"] = round(float(np.median(times[f"peer {what}"]) / np.median(times[what])), 3)
    return result


def show(title: str, result: dict[str, Any], config: DecoderConfig) -> None:
    """Print one table."""
    weights = ternary_weights(config)
    floor = weights / 4 / (result["read_gb_s"] * 1e9) * 1e3
    print(
        f"\n{title}; memory reads {result['read_gb_s']} GB/s, so a step's ternary weights take at least {floor:.2f} ms"
    )
    print(f"  {'':28}{'p20':>9}{'p50':>9}{'p80':>9}   ms")
    for name, label in (("decode", "one token"), ("prefill", f"prefill of {PREFILL}")):
        tokens = 1 if name == "decode" else PREFILL
        for who in ("", "peer "):
            if who + name not in result:
                continue
            t = result[who + name]
            rate = weights * tokens / t["p50_ms"] / 1e6
            share = f", {floor / t['p50_ms']:.0%} of the bandwidth" if name == "decode" else ""
            print(
                f"  {label + (', llama.cpp' if who else ', ours'):28}{t['p20_ms']:9.2f}{t['p50_ms']:9.2f}{t['p80_ms']:9.2f}"
                f"   {rate:.0f} Gw*tok/s{share}"
            )
        if f"{name} ratio" in result:
            print(f"  {'':28}llama.cpp / ours = {result[f'{name} ratio']:.2f}")


def whole_model(rounds: int, past: int, bandwidth: Callable[[], float]) -> dict[str, object]:
    """30 layers with the 8-bit head over 128,256 tokens: tokens a second, and without the head."""
    result: dict[str, object] = {}
    for name, vocab in (("30 layers, 8-bit head", 128256), ("30 layers, no head", SMALL)):
        decoder = CpuDecoder(random_decoder(config_2b(30, vocab)))
        cache = decoder.make_cache()
        decode_times(decoder, cache, past, 2)
        seconds, rates = [], []
        for _ in range(rounds):
            seconds += decode_times(decoder, cache, past, 4)
            rates.append(bandwidth())
        size, middle, rate = decoder.weights.nbytes, float(np.median(seconds)), float(np.median(rates))
        result[name] = {**spread(seconds), "tokens_s": round(1 / middle, 2), "weight_bytes": size, "past": past}
        share = size / rate / middle
        print(
            f"\n{name}: {1 / middle:.1f} tokens/s after {past} positions ({middle * 1e3:.1f} ms; {size / 1e6:.0f} MB of "
            f"weights at {size / middle / 1e9:.1f} GB/s, {share:.0%} of the {rate / 1e9:.1f} GB/s read here)"
        )
    return result


def machine() -> dict[str, object]:
    """Where and with what this ran."""
    import llvmlite
    import numba

    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    return {
        "machine": platform.machine(), "system": platform.platform(), "processor": processor(),
        "cores": os.cpu_count(), "body": isa.body_name(), "threading_layer": threads.threading_layer(),
        "threads": threads.get_threads(), "python": platform.python_version(), "numpy": np.__version__,
        "numba": numba.__version__, "llvmlite": llvmlite.__version__, "commit": commit,
        "command": "python " + " ".join([os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }  # fmt: skip


def parse() -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--peer", choices=["llama.cpp"], help="also time this peer, in turns")
    made = ROOT / ".peer" / "bin" / "python"  # where the help text makes it
    python = str(made) if made.exists() else sys.executable
    p.add_argument(
        "--peer-python", default=python, help="the Python that has llama_cpp and gguf (default: .peer/ or this one)"
    )
    model = Path(tempfile.gettempdir()) / "bitnet-mlx-bench" / "tq2_0.gguf"
    p.add_argument("--peer-model", type=Path, default=model, help="written if missing")
    p.add_argument("--threads", type=int, default=2, help="threads of each (default 2)")
    p.add_argument("--rounds", type=int, default=12, help="turns of each (default 12)")
    p.add_argument("--past", type=int, default=256, help="positions behind a token of the 30-layer model (default 256)")
    p.add_argument("--skip-whole", action="store_true", help="leave out the 30-layer model (it takes 1.5 GB of memory)")
    p.add_argument("--record", type=Path, help="append the JSON record to this file")
    return p.parse_args()


def main() -> None:
    """Run everything and print the record."""
    args = parse()
    load = round(os.getloadavg()[0], 2)  # before anything of ours runs
    quiet = "idle machine" if load <= IDLE else f"NOT idle, load average {load}"
    threads.launch()  # before numba runs anything of the benchmark, or numba picks a layer without ours
    threads.set_threads(args.threads)
    peer = Peer(args.peer_python, args.peer_model, args.threads) if args.peer else None
    bandwidth, ours = read_bandwidth(), Ours()
    record: dict[str, Any] = {"benchmark": "decode", **machine(), "load_average": load}
    if peer:
        record["peer"] = {"name": args.peer, **peer.ask("versions")}
    compare(ours, peer, 2, bandwidth)  # warm-up
    record["idle"] = idle = compare(ours, peer, args.rounds, bandwidth)
    title = f"{LAYERS} layers, {args.threads} threads each"
    show(f"{title}, {quiet}", idle, ours.config)
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        record["busy"] = compare(ours, peer, args.rounds, bandwidth)
    finally:
        busy.kill()
        busy.wait()
    show(f"{title}, beside one busy process", record["busy"], ours.config)  # type: ignore[arg-type]
    if peer:
        peer.close()
    if not args.skip_whole:
        record["whole"] = whole_model(args.rounds, args.past, bandwidth)
    line = json.dumps(record)
    if args.record:
        args.record.parent.mkdir(parents=True, exist_ok=True)
        with args.record.open("a") as f:
            f.write(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
