"""Flags of mlx-lm and llama.cpp that are none of ours: what to say instead."""

from __future__ import annotations

_SAMPLER = "it is not offered; --top-p, --top-k, --min-p and --repetition-penalty are"
_TEMPLATE = (
    "a model's own chat template is used, with its own defaults; --ignore-chat-template gives the text as it stands"
)
_ESCAPE = 'what is typed stands as it is; """ opens a message of several lines'
_REQUEST = "requests say it, else the model's generation_config.json"
_ONE_MACHINE = "a model runs on one machine here"
_REPORT = "the log is log.jsonl beside the adapter; --plot draws it"

EVERYWHERE = {
    "--trust-remote-code": "code that comes with a model is never run; leave it out",
    "--pipeline": _ONE_MACHINE,
    "--prefill-step-size": "a prompt goes in parts by itself; leave it out",
    "--quantize-activations": "say --activations 8, or 16",
    "-qa": "say --activations 8, or 16",
    "--kv-group-size": "groups have 64 values; leave it out",
    "--quantized-kv-start": "--kv-bits holds from the first token on; leave it out",
    "-ngl": "--backend says what computes; nothing is split between GPU and CPU",
    "-hf": "say --model OWNER/NAME, or OWNER/NAME/FILE.gguf",
    "-t": "say --threads N",
    "-v": "say --verbose",
    "--device": "say --backend B",
    "-md": "say --draft-model",
    "-ctk": "say --kv-bits 8 or 4",
    "-ctv": "say --kv-bits 8 or 4",
    "--lora": "say --adapter-path DIR; mlx-lm's adapters are read, llama.cpp's are not",
    "--no-mmap": "files are always mapped; leave it out",
    "--mlock": "nothing is locked into memory; leave it out",
}
_PACKED = "ternary weights are packed by themselves; --format says how, --head-bits is for embedding and head"
_PROMPT = {
    "-m": "say --model M, or --max-tokens N",
    "--eos-token": "the model's files say what ends a text; leave it out",
    "--use-default-chat-template": _TEMPLATE,
    "--chat-template-config": _TEMPLATE,
    "--chat-template-args": _TEMPLATE,
    "--chat-template": _TEMPLATE,
    "-c": "say --max-kv-size N",
    "--ctx-size": "say --max-kv-size N",
    "-sys": "say --system-prompt TEXT",
}
_FILE = {"-f": "say --prompt - < FILE", "--file": "say --prompt - < FILE"}
_TEXT = {
    "--extra-eos-token": "say --stop TEXT",
    "--image": "models here read text alone",
    "--xtc-probability": _SAMPLER,
    "--xtc-threshold": _SAMPLER,
    "--min-tokens-to-keep": "--min-p always keeps one; leave it out",
    "--temperature": "say --temp T",
    "--stream": "text is shown as it comes; leave it out",
    "-n": "say --max-tokens N",
    "--max-new-tokens": "say --max-tokens N",
    "--n-predict": "say --max-tokens N",
    "-s": "say --seed S",
    "-r": "say --stop TEXT",
    "--reverse-prompt": "say --stop TEXT",
    "-i": "that is bitnet-mlx chat; leave it out",
    "-cnv": "that is bitnet-mlx chat; leave it out",
    "--repeat-penalty": "say --repetition-penalty R",
    "--repeat-last-n": "say --repetition-context-size N",
}
_LORA = {
    "--report-to": _REPORT,
    "--project-name": _REPORT,
    "--clear-cache-threshold": "MLX's cache is left to MLX; leave it out",
}
BY_COMMAND: dict[str, dict[str, str]] = {
    "generate": {
        **_PROMPT,
        **_FILE,
        **_TEXT,
        "--prefill-response": "write the answer's beginning into --prompt, with --ignore-chat-template",
        "--no-escape": "that is so unless --escape is given; leave it out",
        "-j": "say --json-schema SCHEMA",
        "--grammar": "say --json-schema SCHEMA; other grammars are fields of the server's requests",
    },
    "chat": {
        **_PROMPT,
        **_TEXT,
        "--prompt": "type it, or pipe it into bitnet-mlx chat; bitnet-mlx generate takes --prompt",
        "-p": "type it, or pipe it into bitnet-mlx chat; bitnet-mlx generate takes --prompt",
        "-e": _ESCAPE,
        "--escape": _ESCAPE,
    },
    "cache-prompt": {**_PROMPT, **_FILE},
    "serve": {
        "--allowed-origins": "say --cors ORIGIN, once for each; * is not taken",
        "--log-level": "say --verbose or --debug",
        "--chat-template": _TEMPLATE,
        "--use-default-chat-template": _TEMPLATE,
        "--chat-template-args": _TEMPLATE,
        "--temp": _REQUEST,
        "--top-p": _REQUEST,
        "--top-k": _REQUEST,
        "--min-p": _REQUEST,
        "--decode-concurrency": "say --max-batch N",
        "--prompt-concurrency": "prompts join the batch of --max-batch; leave it out",
        "--prompt-cache-size": "say --prompt-cache-bytes SIZE",
        "--draft-model": "--prompt-lookup guesses without one",
        "-np": "say --max-batch N",
        "--parallel": "say --max-batch N",
        "-c": "say --max-kv-size N",
        "--ctx-size": "say --max-kv-size N",
    },
    "convert": {
        "-q": _PACKED,
        "--quantize": _PACKED,
        "--q-bits": _PACKED,
        "--q-group-size": "a ternary matrix has the scales that it was trained with; --ternarize-scales is for floats",
        "--q-mode": _PACKED,
        "--quant-predicate": "--keep-layers and --calibration leave layers as floats",
        "-d": "say --format hf-float",
        "--dequantize": "say --format hf-float",
        "--outtype": "say --format gguf-tq2_0 or gguf-tq1_0",
        "--outfile": "say --mlx-path FILE.gguf",
    },
    "fuse": {
        "--upload-repo": "fuse first, then bitnet-mlx convert --upload-repo OWNER/NAME",
        "--export-gguf": "say --format gguf-tq2_0 or gguf-tq1_0",
        "--gguf-path": "say --save-path FILE.gguf with --format gguf-tq2_0",
    },
    "lora": _LORA,
    "evaluate": {
        "--data-path": "say --data FILE: text files, no names of data sets",
        "--sequence-length": "say --length L",
        "--num-samples": "say --limit N: tokens of each file",
        "--output-dir": "say --json > FILE",
        "--batch-size": "texts are scored one after another; leave it out",
        "--fewshot-as-multiturn": "examples stand in one turn",
        "--no-apply-chat-template": "that is so unless --apply-chat-template is given; leave it out",
        "--chat-template-args": _TEMPLATE,
        "--confirm-run-unsafe-code": "tasks that run code are not run",
        "--max-tokens": "the task says it",
        "--temp": "answers are the most likely ones",
        "--top-p": "answers are the most likely ones",
        "--top-k": "answers are the most likely ones",
        "--seed": "nothing is drawn",
    },
    "bench": {
        "--prompt-tokens": "say --prompt N",
        "-p": "say --prompt N",
        "--generation-tokens": "say --tokens N",
        "-g": "say --tokens N",
        "-n": "say --tokens N, or --repeats N for trials",
        "--num-trials": "say --repeats N",
        "--batch-size": "bench backends measures batches as well",
        "-b": "bench backends measures batches as well",
        "--delay": "contenders take turns without pauses; leave it out",
    },
}
