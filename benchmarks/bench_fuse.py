"""What is left of an adapter once it is fused into ternary weights, on the text that it learnt and on another.

    python benchmarks/bench_fuse.py [--iters N] [--record FILE.jsonl]

An adapter learns four sentences over the embedded model; `fuse` then makes the sum ternary in three ways, or floats. A way
whose model is no better than the base is refused, and said to be. The second text is a file of this package.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from bitnet_mlx.api import embedded_model, load  # noqa: E402
from bitnet_mlx.backends import choose, choose_on_mlx  # noqa: E402
from bitnet_mlx.bench.stamp import append, stamp  # noqa: E402
from bitnet_mlx.errors import TrainError  # noqa: E402
from bitnet_mlx.quality.score import score  # noqa: E402
from bitnet_mlx.quality.texts import read_text  # noqa: E402
from bitnet_mlx.train.fuse import fuse  # noqa: E402
from bitnet_mlx.train.fuse_options import FuseOptions  # noqa: E402
from bitnet_mlx.train.lora import lora  # noqa: E402
from bitnet_mlx.train.lora_options import LoraOptions  # noqa: E402

SENTENCES = (
    "The harbour opens at dawn and closes when the last boat is in.",
    "A careful keeper writes the tide of each morning into the green book.",
    "Nobody sails past the red buoy without a lamp and a second rope.",
    "In winter the crane stands still and the gulls sleep on its arm.",
)
CODE = ROOT / "bitnet_mlx" / "ternary.py"
CODE_TOKENS, REPEATS = 512, 8  # of the text that was not learnt; of the sentences, so that gptq has a text to fit to
WAYS: dict[str, dict[str, Any]] = {
    "least-squares": {"method": "least-squares"},
    "gptq": {"method": "gptq", "scales": "group"},
    "floats": {"dequantize": True},
}


def trained(folder: Path, iters: int) -> dict[str, Any]:
    """The adapter in folder / "adapter", and its training's record."""
    data = folder / "samples"
    data.mkdir()
    (data / "train.jsonl").write_text("".join(json.dumps({"text": s}) + "\n" for s in SENTENCES))
    options = LoraOptions(
        train=True, data=data, adapter_path=folder / "adapter", iters=iters, learning_rate=1e-3, batch_size=4
    )
    model, tokenizer = load(backend=choose_on_mlx().name, dtype="float32")
    return lora(options, model, tokenizer, lambda entry: None)  # type: ignore[arg-type]


def quality(texts: tuple[Path, ...], model: Path | None, adapter: Path | None) -> dict[str, float]:
    """Perplexity of each text, by its name."""
    decoder, tokenizer = load(model, adapter_path=adapter)
    found = {}
    for path in texts:
        text = read_text(path, tokenizer, CODE_TOKENS)
        found[path.stem] = score(decoder, text.ids, text.nbytes, 256, 128).record()["perplexity"]
    return found


def main() -> None:
    """Train, fuse each way, measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iters", type=int, default=40, help="steps of the adapter (default: 40)")
    parser.add_argument("--record", type=Path, help="append the record to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        learnt = trained(folder, args.iters)
        (folder / "learnt.txt").write_text("\n".join(SENTENCES))
        (folder / "fit.txt").write_text("\n".join(SENTENCES * REPEATS))
        texts, adapter = (folder / "learnt.txt", CODE), folder / "adapter"
        record: dict[str, Any] = {
            **stamp(choose().name), "benchmark": "fuse", "model": "embedded", "iters": args.iters, "rank": LoraOptions.rank,
            "loss": learnt["loss"], "perplexity": {
                "base": quality(texts, embedded_model(), None), "base and adapter": quality(texts, embedded_model(), adapter),
            }, "refused": {}, "seconds": {},
        }  # fmt: skip
        for name, how in WAYS.items():
            target, start = folder / name, time.perf_counter()
            fit = {"calibration_data": folder / "fit.txt"} if name == "gptq" else {}
            try:
                fuse(FuseOptions(adapter_path=adapter, save_path=target, load={}, **how, **fit))
                record["perplexity"][name] = quality(texts, target, None)
            except TrainError as error:
                record["refused"][name] = str(error).partition(";")[0]
            record["seconds"][name] = time.perf_counter() - start
            print(name, record["perplexity"].get(name) or record["refused"][name], file=sys.stderr, flush=True)
    print(json.dumps(record))
    if args.record:
        append(record, args.record)


if __name__ == "__main__":
    main()
