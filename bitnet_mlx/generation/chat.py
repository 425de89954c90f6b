"""A conversation that computes each position once: the cache keeps what the next turn's ids have in common with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bitnet_mlx.errors import ConfigError
from bitnet_mlx.generation.api import conversation_ids
from bitnet_mlx.generation.prompt_cache import Said, keep_shared, load_prompt, save_prompt
from bitnet_mlx.generation.sampling import Sampler, SamplingConfig
from bitnet_mlx.generation.speculation import Speculation
from bitnet_mlx.generation.stream import MAX_TOKENS, GenerationResponse, Progress, check_context, stream_generate
from bitnet_mlx.generation.thinking import ThoughtReader, place, thinks
from bitnet_mlx.models.decoder import Decoder
from bitnet_mlx.tokenizer import Tokenizer


class ChatSession:
    """One conversation. `messages` is its history without the system prompt; what was thought before an answer is apart in
    it, and the template decides whether the model sees it again. `part`: (thought, said) of the reply's newest token.

    raw: no template; each text is appended to what came before and the model continues it (for base models).
    reuse_cache False computes every turn from the start; the replies are the same.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer,
        system_prompt: str | None = None,
        *,
        sampling: SamplingConfig | None = None,
        max_tokens: int = MAX_TOKENS,
        stop: Sequence[str] = (),
        max_kv_size: int | None = None,
        raw: bool = False,
        reuse_cache: bool = True,
        speculation: Speculation | None = None,
    ) -> None:
        """Raises ConfigError where max_kv_size is not allowed, or a template is wanted and the model has none."""
        if not raw:
            conversation_ids(tokenizer, [{"role": "user", "content": "?"}], system_prompt)
        self.messages: list[dict[str, str]] = []
        self._decoder, self._tokenizer = decoder, tokenizer
        self._system, self._raw, self._reuse = system_prompt, raw, reuse_cache
        self._thinks = not raw and thinks(tokenizer)
        self.part = ("", "")
        self._sampler = Sampler(sampling or SamplingConfig())
        self._options: dict[str, Any] = {"max_tokens": max_tokens, "stop": stop, "max_kv_size": max_kv_size}
        self._options["speculation"] = speculation
        self.context = check_context(decoder, max_kv_size)
        self._opening = ""  # what a file says before the first message
        self._cache: Any = None
        self._ids: list[int] = []  # what the conversation's positions held; the cache holds the first `offset` of them

    def reset(self) -> None:
        """Forget the conversation; the system prompt and the random generator stay."""
        self.messages.clear()
        self._ids, self._opening = [], ""
        self._cache = None

    @property
    def positions(self) -> int:
        """Positions of the context that the conversation takes."""
        return len(self._ids)

    def save(self, path: Path | str, model: str) -> int:
        """Write the conversation with its keys and values to a file; its size in bytes. model: its name, for messages.

        Raises what save_prompt does.
        """
        said = Said(self._opening, self.messages, self._system, self._raw)
        return save_prompt(path, self._decoder, self._cache, self._ids, said, model)

    def load(self, path: Path | str, model: str) -> None:
        """Go on with a saved conversation, or after a prompt that cache-prompt computed; nothing is computed again.

        Its system prompt holds from here on. Raises what load_prompt does, and ConfigError where one of the two uses a chat
        template and the other does not; the conversation is then as it was.
        """
        saved = load_prompt(path, self._decoder, model, self.context)
        if saved.said.raw != self._raw:
            raise ConfigError(
                f"[prompt cache] {path} was made {'without' if saved.said.raw else 'with'} a chat template; start chat "
                f"{'with' if saved.said.raw else 'without'} --ignore-chat-template to go on with it"
            )
        self.messages, self._ids, self._cache = saved.said.messages, saved.ids, saved.cache
        self._system, self._opening = saved.said.system_prompt, saved.said.text

    def reply(self, text: str, progress: Progress | None = None) -> Iterator[GenerationResponse]:
        """Answer one message, one response a token.

        Stopped half way (an interrupt, a closed generator), the part that was made stays in the history. When nothing
        was made, the message is taken back. Raises ConfigError when the conversation no longer fits the context.
        """
        if not self.messages:
            text = self._opening + text
        ids = self._next_ids(text)
        before = list(self._ids)
        thoughts = ThoughtReader(place(self._tokenizer, ids) == "inside") if self._thinks else None
        parts: list[tuple[str, str]] = []
        generated: list[int] = []
        try:
            stream = stream_generate(
                self._decoder,
                self._tokenizer,
                ids,
                cache=self._matching_cache(ids),
                sampling=self._sampler,
                progress=progress,
                **self._options,
            )
            self._ids = list(ids)  # not where it was refused
            for response in stream:
                generated.append(response.token)
                ends = response.finish_reason is not None
                self.part = thoughts.feed(response.text, ends) if thoughts else ("", response.text)
                parts.append(self.part)
                yield response
        finally:
            if generated:
                if generated[-1] in self._tokenizer.eos_token_ids:
                    generated.pop()  # never fed; a template writes its own, and raw text goes on
                self._ids = ids + generated
                if thoughts:
                    parts.append(thoughts.feed("", last=True))
                self.messages += [{"role": "user", "content": text}, _answer(parts)]
            elif self._raw:
                self._take_back(before)

    def _next_ids(self, text: str) -> list[int]:
        if self._raw and (self.messages or not self._opening):
            return self._ids + self._tokenizer.encode(text, add_special_tokens=not self._ids)
        if self._raw:
            return self._tokenizer.encode(text)
        return conversation_ids(self._tokenizer, [*self.messages, {"role": "user", "content": text}], self._system)

    def _take_back(self, ids: list[int]) -> None:
        self._ids = ids
        if self._cache is not None:
            self._cache.trim(len(ids))

    def _matching_cache(self, ids: list[int]) -> Any:
        """The cache, cut back to the ids that it shares with `ids`, at most all but the last."""
        if self._cache is None or not self._reuse:
            self._cache = self._decoder.make_cache(self.context)
            return self._cache
        keep_shared(self._cache, self._ids, ids)
        return self._cache


def _answer(parts: Sequence[tuple[str, str]]) -> dict[str, str]:
    """The message that (thought, said) add up to."""
    thought, said = ("".join(texts) for texts in zip(*parts, strict=True))
    return {"role": "assistant", "content": said, **({"reasoning_content": thought} if thought else {})}
