"""Run by a python that has torch: logits and codes of transformers on a folder.

python tests/train/transformers_forward.py FOLDER OUT.npz TOKEN [TOKEN ...]
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
import transformers

from tests.oracle.make_goldens import watch


def main() -> None:
    folder, out, *tokens = sys.argv[1:]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert type(model).__name__ == "BitNetForCausalLM"
    codes: dict[str, np.ndarray] = {}
    watch(model, codes)
    with torch.no_grad():
        logits = model(torch.tensor([[int(t) for t in tokens]])).logits[0].numpy()
    text = "def f(x):\n    return x + 12  # é\n"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    np.savez(out, logits=logits, ids=ids, **{f"codes/{name}": value for name, value in codes.items()})


if __name__ == "__main__":
    main()
