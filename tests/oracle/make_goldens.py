"""Make the golden logits and codes with torch and transformers.

    OMP_NUM_THREADS=1 python tests/oracle/make_goldens.py [--out FOLDER] [--attention sdpa|eager] [CASE ...]

Needs torch, transformers and accelerate; made with the versions in tests/golden/data/manifest.json. Everything is in
float32. The codes are ActQuant's own formula on the input of each BitNet linear, as torch computes it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # before torch is imported: eager, so that no compiler is needed
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
import transformers
from transformers.integrations import bitnet

from tests.golden import recipe, store
from tests.golden.cases import CASES, Case

SHARED = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj"))


def load_model(case: Case, folder: Path, attention: str) -> Any:
    """The checkpoint in float32. transformers 5.24 leaves parts of a packed one in bfloat16: they are cast."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention
    )
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.dtype == torch.bfloat16:
            tensor.data = tensor.data.float()
    for module in model.modules():
        if isinstance(module, bitnet.BitLinear):
            module.dtype = torch.float32
    return model.eval()


def quantize(x: torch.Tensor) -> np.ndarray:
    """transformers' int8 codes of a linear's input: [1, L, K] -> int8 [L, K]."""
    x = x.detach().float()
    scale = 127 / x.abs().max(dim=-1, keepdim=True).values.clamp(min=1e-5)
    return (x * scale).round().clamp(-128, 127).to(torch.int8)[0].numpy()


def watch(model: Any, codes: dict[str, np.ndarray]) -> list[Any]:
    """Record the codes at every BitNet linear, once for linears that share their input."""

    def hook(name: str) -> Callable[..., None]:
        def record(module: Any, args: Any) -> None:
            x = args[0] if module.rms_norm is None else module.rms_norm(args[0])
            codes[name] = quantize(x)

        return record

    quantized = {n: m for n, m in model.named_modules() if isinstance(m, bitnet.BitLinear | bitnet.AutoBitLinear)}
    normed = {n for n, m in quantized.items() if m.rms_norm is not None}
    repeated = set()
    for name in quantized:
        for group in SHARED:
            prefix = next((name.removesuffix(g) for g in group if name.endswith(g)), None)
            if prefix is not None:
                present = [prefix + g for g in group if prefix + g in quantized and prefix + g not in normed]
                repeated.update(present[1:])
    return [m.register_forward_pre_hook(hook(n)) for n, m in quantized.items() if n not in repeated]


@torch.no_grad()
def generate(model: Any, tokens: tuple[int, ...], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Greedy tokens by transformers' own generate, with its cache, and the top-two margin at each step."""
    made = model.generate(
        torch.tensor([tokens]),
        attention_mask=torch.ones(1, len(tokens), dtype=torch.long),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
        eos_token_id=None,
    )
    top = torch.stack(made.logits)[:, 0].topk(2).values
    return made.sequences[0, len(tokens) :].numpy().astype(np.int16), (top[:, 0] - top[:, 1]).float().numpy()


@torch.no_grad()
def make(case: Case, folder: Path, attention: str) -> store.Golden:
    """Run one case."""
    plain = bitnet.ActQuant.forward
    if case.activation_bits == 16:
        bitnet.ActQuant.forward = staticmethod(lambda ctx, activation: activation)
    try:
        model = load_model(case, folder, attention)
        codes: dict[str, np.ndarray] = {}
        hooks = watch(model, codes) if case.activation_bits == 8 else []
        logits = model(torch.tensor([case.tokens])).logits[0]
        assert logits.dtype == torch.float32
        for hook in hooks:
            hook.remove()
        greedy = generate(model, case.tokens, case.greedy) if case.greedy else ()
    finally:
        bitnet.ActQuant.forward = plain
    kept = np.arange(len(case.tokens)) if case.kept is None else np.array(case.kept)
    top = logits.topk(2).values
    return store.Golden(
        kept.astype(np.int32),
        logits[kept].numpy(),
        logits.argmax(-1).numpy().astype(np.int16),
        (top[:, 0] - top[:, 1]).numpy(),
        codes if case.kept is None else {name: store.digest(value) for name, value in codes.items()},
        *greedy,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=list(CASES), help="all by default; others keep what they have")
    parser.add_argument("--out", type=Path, default=store.DATA)
    parser.add_argument("--attention", default="sdpa")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    sums = {}
    if (args.out / "manifest.json").exists():
        sums = {k: v for k, v in store.manifest(args.out)["checkpoints"].items() if k not in args.cases}
    for name in args.cases:
        with tempfile.TemporaryDirectory() as folder:
            sums[name] = recipe.write(CASES[name], Path(folder))
            recipe.write(CASES[name], Path(folder), for_transformers=True)
            golden = make(CASES[name], Path(folder), args.attention)
        store.save(args.out / f"{name}.npz", golden)
        print(name, sums[name][:16], *(f"{v:.6f}" for v in golden.logits[-1, :4]), flush=True)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "numpy": np.__version__}
    record = {"made_with": versions, "checkpoints": sums}
    (args.out / "manifest.json").write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
