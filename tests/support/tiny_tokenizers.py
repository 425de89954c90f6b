"""Small tokenizers trained on the spot (a few hundredths of a second each), in folders laid out as on the hub."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

WORDS = (
    "the quick brown fox jumps over a lazy dog hello world def return import class self value naïve café über straße "
    "你好 世界 здравствуй мир xs ( ) [ ] : = 0 1 12 345 _name snake_case CamelCase don't we'll"
).split()

TEXTS = (
    "hello world",
    "def f(x):\n    return x + 1\n",
    "naïve café, über-straße!",
    "你好，世界 — здравствуй",
    "👩‍👩‍👧‍👦 family 🎉🏳️‍🌈",
    "e\u0301 a\u030a combining \u0928\u093f",
    "  two  spaces\tand tabs \n\n",
    " leading",
    "trailing ",
    "",
    " ",
    "\x00\x7f control \ufffd replacement",
    "not always <s> special </s><unk>",
)

CHAT = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)

# Tools as Qwen's templates have them: offered in front, called between two marks, answered by the role "tool".
CHAT_TOOLS = (
    "{{ bos_token }}{% if tools %}<|start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    "Call with <tool_call> and </tool_call>.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] | trim }}"
    "{% for tool_call in m['tool_calls'] %}{% set tool_call = tool_call.function %}<tool_call>\n"
    '{"name": "{{ tool_call.name }}", "arguments": {{ tool_call.arguments | tojson }}}\n</tool_call>{% endfor %}'
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def lines(count: int = 400, seed: int = 0) -> list[str]:
    """Random sentences of WORDS, several scripts mixed."""
    rng = random.Random(seed)
    return [
        " ".join(rng.choices(WORDS, k=rng.randint(3, 12))) + rng.choice([".", "!", "?", " :)"]) for _ in range(count)
    ]


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def byte_level(folder: Path, bos: bool = True, vocab_size: int = 420, settings: dict[str, Any] | None = None) -> Path:
    """A byte-level BPE in tokenizer.json, Llama 3's kind; with `bos` its post-processor adds one."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|bos|>", "<|eos|>", "<|start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines(), trainer)
    tokenizer.add_tokens([AddedToken("<tool>", special=False)])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|bos|> $A", pair="<|bos|> $A $B", special_tokens=[("<|bos|>", tokenizer.token_to_id("<|bos|>"))]
        )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    base = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|bos|>", "eos_token": "<|eos|>"}
    write_json(folder / "tokenizer_config.json", {**base, **(settings or {})})
    return folder


def fallback_json(folder: Path, vocab_size: int = 420, settings: dict[str, Any] | None = None) -> Path:
    """A tokenizer.json like Llama 2's: characters, byte fallback, a visible space in front."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>"]
    alphabet = sorted(set("▁" + "".join(c for c in "".join(WORDS) if c.isascii())))
    bytes_ = [f"<0x{b:02X}>" for b in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special + bytes_,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator([line.split(" ") for line in lines()], trainer)
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [t for t in state["added_tokens"] if not t["content"].startswith("<0x")]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    base = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    write_json(folder / "tokenizer_config.json", {**base, **(settings or {})})
    return folder


def sentencepiece_model(
    folder: Path,
    byte_fallback: bool = True,
    model_type: str = "bpe",
    name: str = "tokenizer.model",
    settings: dict[str, Any] | None = None,
    **options: Any,
) -> Path:
    """A sentencepiece model; with byte fallback it keeps all spaces, as Llama's does."""
    import sentencepiece

    if byte_fallback:
        options = {"remove_extra_whitespaces": False, "normalization_rule_name": "identity", **options}
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines()),
        model_writer=buffer,
        model_type=model_type,
        vocab_size=400 if byte_fallback else 130,
        byte_fallback=byte_fallback,
        character_coverage=0.98,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(buffer.getvalue())
    base = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    write_json(folder / "tokenizer_config.json", {**base, **(settings or {})})
    return folder


def auto(folder: Path) -> Any:
    """What transformers makes of a folder."""
    from transformers import AutoTokenizer

    write_json(folder / "config.json", {"model_type": "bitnet"})
    return AutoTokenizer.from_pretrained(str(folder))
