"""JSON of answers and of the chunks of a stream, in OpenAI's shapes."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from bitnet_mlx import __version__
from bitnet_mlx.generation.thinking import ThoughtReader
from bitnet_mlx.serve.calls import CallReader, Said
from bitnet_mlx.serve.work import Echo, Piece
from bitnet_mlx.tokenizer import Tokenizer


@dataclass
class Choice:
    """What has come of one text."""

    pieces: list[Piece] = field(default_factory=list)
    echo: Echo | None = None
    finish_reason: str | None = None

    def add(self, event: Piece | Echo) -> None:
        if isinstance(event, Echo):
            self.echo = event
        else:
            self.pieces.append(event)
        self.finish_reason = event.finish_reason

    @property
    def text(self) -> str:
        return (self.echo.text if self.echo else "") + "".join(piece.text for piece in self.pieces)

    @property
    def told(self) -> list[Piece]:
        return [*(self.echo.pieces if self.echo else ()), *self.pieces]

    @property
    def rate(self) -> float:
        """Mean log probability of its tokens, by which best_of chooses."""
        values = [piece.logprob for piece in self.pieces if piece.logprob is not None]
        return sum(values) / len(values) if values else float("-inf")


@dataclass(frozen=True)
class Kind:
    """What an answer is to hold. chat: messages, else plain texts. thoughts: makes the reader of each text's thoughts, calls
    that of its tool calls.

    named: a function that had to be called was, which ends a text as "stop".
    """

    chat: bool
    logprobs: bool = False
    thoughts: Callable[[], ThoughtReader] | None = None
    calls: Callable[[], CallReader] | None = None
    named: bool = False


class Answer:
    """One request's answer. prompts: token count of each prompt, counted once."""

    def __init__(self, kind: Kind, model: str, tokenizer: Tokenizer, prompts: Sequence[int]) -> None:
        self.id = f"{'chatcmpl' if kind.chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._kind, self._model, self._tokenizer = kind, model, tokenizer
        self._prompt_tokens = sum(prompts)
        self._created = int(time.time())
        self._offsets: dict[int, int] = {}
        self._thoughts: dict[int, ThoughtReader] = {}
        self._readers: dict[int, CallReader] = {}
        self.completion_tokens = 0
        self.cached_tokens = 0  # of the prompts', known once they have been read

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The answer that is no stream."""
        made = []
        for index, choice in enumerate(choices):
            logprobs = self._tell(index, choice.told)
            content: dict[str, Any] = {"text": choice.text}
            finish = choice.finish_reason
            if self._kind.chat:
                said, finish = self._said(index, choice.pieces)
                message: dict[str, Any] = {"role": "assistant", "content": said.content, "refusal": None}
                if said.thought:
                    message["reasoning_content"] = said.thought
                if said.calls:
                    calls = [{k: v for k, v in call.items() if k != "index"} for call in said.calls]
                    message |= {"content": said.content or None, "tool_calls": calls}
                content = {"message": message}
            made.append({"index": index, **content, "logprobs": logprobs, "finish_reason": finish})
        kind = "chat.completion" if self._kind.chat else "text_completion"
        return {**self._head(kind), "choices": made, "usage": self.usage()}

    def opening(self, index: int) -> dict[str, Any] | None:
        """The chunk that names the role; plain texts have none."""
        return self._chunk(index, {"role": "assistant", "content": ""}, None, None) if self._kind.chat else None

    def chunks(self, index: int, event: Piece | Echo) -> list[dict[str, Any]]:
        """One token's chunks, or the prompt's; none where it has nothing to tell. Each call has one of its own, and then so
        has the end."""
        self.count(event)
        logprobs = self._tell(index, event.pieces if isinstance(event, Echo) else [event])
        if not self._kind.chat:
            told = event.text or event.finish_reason or self._kind.logprobs
            return [self._chunk(index, event.text, logprobs, event.finish_reason)] if told else []
        assert isinstance(event, Piece)
        said, finish = self._said(index, [event])
        texts = {"reasoning_content": said.thought, "content": said.content}
        deltas: list[dict[str, Any]] = [{name: text} for name, text in texts.items() if text]
        deltas += [{"tool_calls": [call]} for call in said.calls]
        if (said.calls and finish) or (not deltas and (finish or self._kind.logprobs)):
            deltas.append({} if finish else {"content": ""})
        last = len(deltas) - 1
        return [
            self._chunk(index, delta, None if at else logprobs, finish if at == last else None)
            for at, delta in enumerate(deltas)
        ]

    def count(self, event: Piece | Echo) -> None:
        """Usage goes by the tokens that were made, whether they are told or not."""
        self.completion_tokens += isinstance(event, Piece)

    def counts(self) -> dict[str, Any]:
        """The last chunk of a stream whose client asked for counts."""
        kind = "chat.completion.chunk" if self._kind.chat else "text_completion"
        return {**self._head(kind), "choices": [], "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        """Tokens of the prompts and of the texts, their end tokens counted."""
        total = self._prompt_tokens + self.completion_tokens
        counts: dict[str, Any] = {"prompt_tokens": self._prompt_tokens, "completion_tokens": self.completion_tokens}
        if self._kind.thoughts is not None:
            thought = sum(reader.tokens for reader in self._thoughts.values())
            counts["completion_tokens_details"] = {"reasoning_tokens": thought}
        return {**counts, "total_tokens": total, "prompt_tokens_details": {"cached_tokens": self.cached_tokens}}

    def _said(self, index: int, pieces: Sequence[Piece]) -> tuple[Said, str | None]:
        """What a stretch of a message thinks, says and calls, and how the message ends, the same in a stream and whole."""
        finish = pieces[-1].finish_reason
        thought, text = self._split(index, pieces)
        if self._kind.calls is None:
            return Said(text, thought=thought), finish
        if index not in self._readers:
            self._readers[index] = self._kind.calls()
        reader = self._readers[index]
        said = reader.feed(text, last=finish is not None)
        said.thought = thought
        if finish == "stop" and reader.calls and not (reader.cut or self._kind.named):
            finish = "tool_calls"
        return said, finish

    def _split(self, index: int, pieces: Sequence[Piece]) -> tuple[str, str]:
        """(what is thought, the rest of the text)."""
        if self._kind.thoughts is None:
            return "", "".join(piece.text for piece in pieces)
        if index not in self._thoughts:
            self._thoughts[index] = self._kind.thoughts()
        reader = self._thoughts[index]
        parts = [reader.feed(piece.text, last=piece.finish_reason is not None) for piece in pieces]
        return "".join(thought for thought, _ in parts), "".join(rest for _, rest in parts)

    def _head(self, kind: str) -> dict[str, Any]:
        version = f"bitnet-mlx-{__version__}"
        return {
            "id": self.id, "object": kind, "created": self._created, "model": self._model, "system_fingerprint": version,
        }  # fmt: skip

    def _chunk(self, index: int, content: Any, logprobs: Any, finish: str | None) -> dict[str, Any]:
        head = self._head("chat.completion.chunk" if self._kind.chat else "text_completion")
        name = "delta" if self._kind.chat else "text"
        return {**head, "choices": [{"index": index, name: content, "logprobs": logprobs, "finish_reason": finish}]}

    def _tell(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any] | None:
        """Log probabilities of tokens that have a text."""
        if not self._kind.logprobs:
            return None
        told = [piece for piece in pieces if not piece.ended]
        if self._kind.chat:
            return {"content": [self._content(piece) for piece in told], "refusal": None}
        return self._columns(index, told)

    def _content(self, piece: Piece) -> dict[str, Any]:
        top = [self._one(token, logprob) for token, logprob in piece.top]
        return {**self._one(piece.token, piece.logprob), "top_logprobs": top}

    def _one(self, token: int, logprob: float | None) -> dict[str, Any]:
        data = self._bytes(token)
        # JSON has no infinity: a forbidden token's is told as OpenAI does, by a very small number.
        value = max(logprob, -9999.0) if logprob is not None else None
        return {"token": data.decode("utf-8", "replace"), "logprob": value, "bytes": list(data)}

    def _columns(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        offsets, tokens, values, tops = [], [], [], []
        for piece in pieces:
            one = self._content(piece)
            offsets.append(self._offsets.get(index, 0))
            shown = bool(piece.text) or piece.token not in self._tokenizer.special_ids
            self._offsets[index] = offsets[-1] + (len(one["token"]) if shown else 0)
            tokens.append(one["token"])
            values.append(one["logprob"])
            top: dict[str, float] = {}
            for other in [*one["top_logprobs"], one]:
                top.setdefault(other["token"], other["logprob"])
            tops.append(top if piece.logprob is not None else None)
        return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}

    def _bytes(self, token: int) -> bytes:
        if token in self._tokenizer.special_ids:
            return (self._tokenizer.id_to_token(token) or "").encode()
        piece = self._tokenizer.pieces[token]
        return piece if isinstance(piece, bytes) else piece.encode("utf-8", "replace")
