"""What mlx-lm and llama.cpp call commands, and ours; and where a flag of mlx-lm's name is not as there."""

from __future__ import annotations

COMMANDS = {
    "server": "bitnet-mlx serve",
    "cache_prompt": "bitnet-mlx cache-prompt",
    "perplexity": "bitnet-mlx evaluate --data FILE",
    "benchmark": "bitnet-mlx bench decode",
    "quantize": "bitnet-mlx convert",
    "gptq": "bitnet-mlx convert --ternarize-method gptq",
    "awq": "bitnet-mlx convert --ternarize-method gptq",
    "dynamic_quant": "bitnet-mlx calibrate, then convert --calibration",
    "dwq": "bitnet-mlx qat",
    "upload": "bitnet-mlx convert --upload-repo",
    "share": "bitnet-mlx convert --upload-repo",
    "manage": "hf cache ls",
    "run": "bitnet-mlx generate or bitnet-mlx chat",
    "cli": "bitnet-mlx generate or bitnet-mlx chat",
    "version": "bitnet-mlx --version",
}

_SAMPLING = "sampling flags left out follow generation_config.json (greedy)"
_CACHE = (
    "--max-kv-size ends the text there (drops the oldest tokens); --kv-bits holds from the first token (the 5000th)"
)
NOT_AS_IN_MLX_LM = {
    "generate": f"--max-tokens 256 (100); {_SAMPLING}; {_CACHE}; --num-draft-tokens as many as pay (3); \\n in a prompt "
    "stays as it is without --escape (becomes a line end).",
    "chat": f"{_SAMPLING}; no --seed unless given (0); {_CACHE}.",
    "cache-prompt": f"{_CACHE}.",
    "serve": "--max-tokens 1024 (512); no --cors unless given (*); models on --allow-model's list alone are loaded (any); "
    "--kv-bits holds from the first token (the 5000th, and one request at a time).",
    "convert": "ternary weights are packed without -q.",
    "fuse": "the sum is made ternary again (quantised as the base), and refused where little is left of the adapter.",
    "lora": "AdamW with betas 0.9 and 0.95 (Adam, 0.9 and 0.999); the rate falls by a cosine (constant); gradients are "
    "clipped at 1 (not at all).",
    "evaluate": "--apply-chat-template only where given (where the model has a template).",
}  # after each, in brackets, what mlx-lm does
