"""What a generation costs: where a token's time goes, what it waits for, and what memory it holds.

    python scripts/examples/profile_generation.py [--model DIR|REPO] [--backend auto] [--tokens 24] [--folder DIR]

Writes trace.json (open it in chrome://tracing or Perfetto) and, where matplotlib is installed, roofline.png.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

from bitnet_mlx import load, profile_generation
from bitnet_mlx.bench.analysis import bytes_held, time_spent
from bitnet_mlx.bench.verdicts import judged
from bitnet_mlx.profile import plots, text, trace

PROMPT = "def read_config(path):"


def main() -> None:
    """Generate, profile, judge, and write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder or a Hugging Face name (default: the model in the package)")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--folder", type=Path, default=Path())
    args = parser.parse_args()
    model, tokenizer = load(args.model, backend=args.backend)

    profile = profile_generation(model, tokenizer, PROMPT, args.tokens)
    print(PROMPT + profile.text, "\n")
    print("\n".join(text.lines(profile)), "\n")

    ids = tokenizer.encode(PROMPT)
    figures = time_spent.parts(model, ids, args.tokens, profile.copy)
    for name, found in (
        ("bottleneck", time_spent.decide_bottleneck(figures)),
        ("optimisation", time_spent.decide_optimisation(figures)),
    ):
        print(f"{name}: {found.name} ({found.reason})")
    memory = judged(bytes_held.memory(model, ids, args.tokens), bytes_held.decide_memory)
    print(f"memory: {memory['verdict']} ({memory['reason']})")

    trace.write(profile, args.folder / "trace.json")
    if importlib.util.find_spec("matplotlib"):
        plots.draw(profile.record(), args.folder / "roofline.png")


if __name__ == "__main__":
    main()
