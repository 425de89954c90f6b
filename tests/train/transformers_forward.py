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
    model, found = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    model.eval()
    unread = [str(name) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in found[kind]]
    codes: dict[str, np.ndarray] = {}
    watch(model, codes)
    with torch.no_grad():
        logits = model(torch.tensor([[int(t) for t in tokens]])).logits[0].numpy()
    text = "def f(x):\n    return x + 12  # é\n"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    about = {"kind": type(model).__name__, "unread": np.array(unread, str)}
    np.savez(out, logits=logits, ids=ids, **about, **{f"codes/{name}": value for name, value in codes.items()})


if __name__ == "__main__":
    main()
