"""llama.cpp as a peer: a process that times its own steps when asked, run by a Python that has llama-cpp-python and gguf.

    python peer_llama_cpp.py MODEL.gguf LAYERS THREADS     (writes the model if it is not there)

One request a line on stdin, one JSON answer a line on stdout: "decode PAST COUNT" gives the seconds of COUNT single-token
steps after PAST tokens, "prefill M" the seconds of one pass over M tokens, "versions" what runs here.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 2560, 6912, 20, 5, 128, 1024
KV = KV_HEADS * HEAD_DIM
SHAPES = {
    "attn_q": (HIDDEN, HIDDEN), "attn_k": (KV, HIDDEN), "attn_v": (KV, HIDDEN), "attn_output": (HIDDEN, HIDDEN),
    "ffn_gate": (FFN, HIDDEN), "ffn_up": (FFN, HIDDEN), "ffn_down": (HIDDEN, FFN),
}  # fmt: skip
BLOCK, BLOCK_BYTES = 256, 66  # TQ2_0: 64 bytes of codes and a float16 scale


def random_tq2_0(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """uint8 [rows, bytes of a row], codes 0 to 2, scale 0.02."""
    blocks = np.empty((rows * columns // BLOCK, BLOCK_BYTES), np.uint8)
    codes = rng.integers(0, 3, (4, len(blocks), 64)).astype(np.uint8)
    blocks[:, :64] = codes[0] | codes[1] << 2 | codes[2] << 4 | codes[3] << 6
    blocks[:, 64:] = np.array([0.02], np.float16).view(np.uint8)
    return blocks.reshape(rows, -1)


def write_model(path: Path, layers: int) -> None:
    """A llama-architecture GGUF: TQ2_0 linears, float16 embedding and head over a small vocabulary."""
    from gguf import GGMLQuantizationType, GGUFWriter

    rng = np.random.default_rng(0)
    out = GGUFWriter(str(path), "llama")
    out.add_context_length(2048)
    out.add_embedding_length(HIDDEN)
    out.add_block_count(layers)
    out.add_feed_forward_length(FFN)
    out.add_head_count(HEADS)
    out.add_head_count_kv(KV_HEADS)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_rope_freq_base(500000.0)
    out.add_rope_dimension_count(HEAD_DIM)
    out.add_vocab_size(VOCAB)
    out.add_tokenizer_model("no_vocab")
    for name in ("token_embd.weight", "output.weight"):
        out.add_tensor(name, (rng.standard_normal((VOCAB, HIDDEN)) * 0.02).astype(np.float16))
    out.add_tensor("output_norm.weight", np.ones(HIDDEN, np.float32))
    for layer in range(layers):
        for name, (n, k) in SHAPES.items():
            tensor = random_tq2_0(rng, n, k)
            out.add_tensor(f"blk.{layer}.{name}.weight", tensor, raw_dtype=GGMLQuantizationType.TQ2_0)
        for name in ("attn_norm", "ffn_norm"):
            out.add_tensor(f"blk.{layer}.{name}.weight", np.ones(HIDDEN, np.float32))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def answer(model: Any, request: list[str]) -> Any:
    """Carry out one request."""
    if request[0] == "versions":
        import llama_cpp  # pyright: ignore[reportMissingImports]

        return {"llama_cpp_python": llama_cpp.__version__, "python": sys.version.split()[0]}
    if request[0] == "prefill":
        tokens = [i % VOCAB for i in range(int(request[1]))]
        model.reset()
        start = time.perf_counter()
        model.eval(tokens)
        return time.perf_counter() - start
    past, count = int(request[1]), int(request[2])
    if model.n_tokens < past:
        model.reset()
        model.eval([i % VOCAB for i in range(past)])
    seconds = []
    for i in range(count):
        model.n_tokens = past  # what lies beyond is dropped by eval
        start = time.perf_counter()
        model.eval([i])
        seconds.append(time.perf_counter() - start)
    return seconds


def main() -> None:
    """Write the model if need be, load it, answer until stdin ends."""
    path, layers, threads = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    from llama_cpp import Llama  # pyright: ignore[reportMissingImports]

    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".part")
        write_model(draft, layers)
        draft.rename(path)
    model = Llama(str(path), n_ctx=1024, n_threads=threads, n_threads_batch=threads, verbose=False)
    for line in sys.stdin:
        print(json.dumps(answer(model, line.split())), flush=True)


if __name__ == "__main__":
    main()
