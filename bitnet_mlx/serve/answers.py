"""JSON of answers and of the chunks of a stream, in OpenAI's shapes."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from bitnet_mlx import __version__
from bitnet_mlx.serve.work import Piece
from bitnet_mlx.tokenizer import Tokenizer


@dataclass
class Choice:
    """What has come of one text."""

    pieces: list[Piece] = field(default_factory=list)

    def add(self, piece: Piece) -> None:
        self.pieces.append(piece)

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    @property
    def finish_reason(self) -> str | None:
        return self.pieces[-1].finish_reason if self.pieces else None


class Answer:
    """One request's answer. chat: messages, else plain texts. prompts: token count of each prompt, counted once."""

    def __init__(self, chat: bool, model: str, tokenizer: Tokenizer, prompts: Sequence[int], logprobs: bool) -> None:
        self.id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._chat, self._model, self._tokenizer = chat, model, tokenizer
        self._prompt_tokens, self._logprobs = sum(prompts), logprobs
        self._created = int(time.time())
        self._offsets: dict[int, int] = {}
        self.completion_tokens = 0
        self.cached_tokens = 0  # of the prompts', known once they have been read

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The answer that is no stream."""
        made = []
        for index, choice in enumerate(choices):
            self.completion_tokens += len(choice.pieces)
            content: dict[str, Any] = {"text": choice.text}
            if self._chat:
                content = {"message": {"role": "assistant", "content": choice.text, "refusal": None}}
            logprobs = self._tell(index, choice.pieces)
            made.append({"index": index, **content, "logprobs": logprobs, "finish_reason": choice.finish_reason})
        kind = "chat.completion" if self._chat else "text_completion"
        return {**self._head(kind), "choices": made, "usage": self.usage()}

    def opening(self, index: int) -> dict[str, Any] | None:
        """The chunk that names the role; plain texts have none."""
        return self._chunk(index, {"role": "assistant", "content": ""}, None, None) if self._chat else None

    def chunk(self, index: int, piece: Piece) -> dict[str, Any] | None:
        """One token's chunk; None where it has nothing to tell."""
        self.completion_tokens += 1
        logprobs = self._tell(index, [piece])
        if not piece.text and not piece.finish_reason and not self._logprobs:
            return None
        delta = {"content": piece.text} if piece.text or not piece.finish_reason else {}
        return self._chunk(index, delta if self._chat else piece.text, logprobs, piece.finish_reason)

    def counts(self) -> dict[str, Any]:
        """The last chunk of a stream whose client asked for counts."""
        return {
            **self._head("chat.completion.chunk" if self._chat else "text_completion"),
            "choices": [],
            "usage": self.usage(),
        }

    def usage(self) -> dict[str, Any]:
        """Tokens of the prompts and of the texts, their end tokens counted."""
        total = self._prompt_tokens + self.completion_tokens
        counts = {"prompt_tokens": self._prompt_tokens, "completion_tokens": self.completion_tokens}
        return {**counts, "total_tokens": total, "prompt_tokens_details": {"cached_tokens": self.cached_tokens}}

    def _head(self, kind: str) -> dict[str, Any]:
        version = f"bitnet-mlx-{__version__}"
        return {
            "id": self.id, "object": kind, "created": self._created, "model": self._model, "system_fingerprint": version,
        }  # fmt: skip

    def _chunk(self, index: int, content: Any, logprobs: Any, finish: str | None) -> dict[str, Any]:
        head = self._head("chat.completion.chunk" if self._chat else "text_completion")
        name = "delta" if self._chat else "text"
        return {**head, "choices": [{"index": index, name: content, "logprobs": logprobs, "finish_reason": finish}]}

    def _tell(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any] | None:
        """Log probabilities of tokens that have a text."""
        if not self._logprobs:
            return None
        told = [piece for piece in pieces if piece.logprob is not None]
        if self._chat:
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
            self._offsets[index] = offsets[-1] + len(one["token"])
            tokens.append(one["token"])
            values.append(one["logprob"])
            top: dict[str, float] = {}
            for other in [*one["top_logprobs"], one]:
                top.setdefault(other["token"], other["logprob"])
            tops.append(top)
        return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}

    def _bytes(self, token: int) -> bytes:
        if token in self._tokenizer.special_ids:
            return (self._tokenizer.id_to_token(token) or "").encode()
        piece = self._tokenizer.pieces[token]
        return piece if isinstance(piece, bytes) else piece.encode("utf-8", "replace")
