"""Embeddings of the Qwen3 cases by torch and transformers: the last hidden states, pooled and normalised.

    python tests/oracle/make_embedding_goldens.py tests/serve/data/embeddings_torch.npz

Mean and last token are taken under an attention mask, as sentence-transformers does, over texts of several lengths that
are padded to one. Everything is in float32.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from torch.nn.functional import normalize

from tests.golden import recipe
from tests.golden.cases import CASES
from tests.oracle.make_goldens import load_model

NAMES = ("qwen3-groups", "qwen3-online")
LENGTHS = (1, 7, 24)


@torch.no_grad()
def main(path: str) -> None:
    out = {}
    for name in NAMES:
        case = CASES[name]
        with tempfile.TemporaryDirectory() as folder:
            recipe.write(case, Path(folder), for_transformers=True)
            model = load_model(case, Path(folder), "sdpa")
        ids = torch.tensor([case.tokens[: max(LENGTHS)]] * len(LENGTHS))
        mask = torch.tensor([[int(i < length) for i in range(max(LENGTHS))] for length in LENGTHS])
        states = model.model(ids, attention_mask=mask).last_hidden_state.float()
        mean = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        last = states[torch.arange(len(LENGTHS)), mask.sum(1) - 1]
        out[f"{name}/mean"], out[f"{name}/last"] = normalize(mean).numpy(), normalize(last).numpy()
        out[f"{name}/plain"] = last.numpy()
    np.savez_compressed(path, lengths=np.array(LENGTHS), **out)


if __name__ == "__main__":
    main(sys.argv[1])
