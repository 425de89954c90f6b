"""What users of other servers (llama.cpp's, mlx-lm's, vLLM's) send beside OpenAI's fields: what may be let pass, and what
to send here instead.
"""

from __future__ import annotations

from typing import Any

# Fields that are not honoured, with the values that ask for nothing: what is done anyway, or not done by default.
NOTHING: dict[str, tuple[Any, ...]] = {
    # OpenAI's
    "suffix": ("",), "store": (False,), "functions": ([],), "function_call": ("none",), "modalities": (["text"],),
    "service_tier": ("auto", "default"), "verbosity": ("medium",), "annotations": ([],), "include_obfuscation": (False,),
    # Other servers'
    "add_generation_prompt": (True,), "bad_words": ([],), "cache_prompt": (True,), "continue_final_message": (False,),
    "dry_multiplier": (0,), "dynatemp_range": (0,), "grammar": ("",), "id_slot": (-1,), "ignore_eos": (False,),
    "include_reasoning": (True,), "include_stop_str_in_output": (False,), "length_penalty": (1,), "lora": ([],),
    "min_keep": (0,), "min_tokens": (0,),
    "mirostat": (0,), "n_discard": (0,), "n_indent": (0,), "n_keep": (0,), "n_probs": (0,), "post_sampling_probs": (False,),
    "priority": (0,), "repeat_penalty": (1,), "return_progress": (False,), "return_token_ids": (False,),
    "return_tokens": (False,), "skip_special_tokens": (True,), "stop_token_ids": ([],), "t_max_predict_ms": (0,),
    "timings_per_token": (False,), "top_n_sigma": (-1,), "typical_p": (1,), "use_beam_search": (False,),
    "xtc_probability": (0,),
}  # fmt: skip

# Fields that have another name here; the meaning may differ a little, so they are not taken for it.
_INSTEAD = {
    "enable_thinking": "chat_template_kwargs", "function_call": "tool_choice", "functions": "tools",
    "grammar": "structured_outputs", "guided_choice": "structured_outputs", "guided_json": "structured_outputs",
    "guided_regex": "structured_outputs", "include_reasoning": "reasoning_format",
    "json_schema": "response_format", "max_new_tokens": "max_tokens",
    "max_output_tokens": "max_tokens", "n_predict": "max_tokens", "n_probs": "logprobs", "num_predict": "max_tokens",
    "reasoning_effort": "chat_template_kwargs", "regex": "structured_outputs",
    "repeat_last_n": "repetition_context_size", "repeat_penalty": "repetition_penalty",
}  # fmt: skip


def asks_for_nothing(name: str, value: Any) -> bool:
    """Whether a field that is not honoured may be let pass with this value."""
    return any(v == value and isinstance(v, bool) == isinstance(value, bool) for v in NOTHING.get(name, ()))


def advice(name: str) -> str:
    """What to do about a field that is not supported."""
    other = _INSTEAD.get(name)
    return f"leave it out, or see {other}" if other else "leave it out"
