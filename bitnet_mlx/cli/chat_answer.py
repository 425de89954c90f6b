"""One answer of a chat: shown as it comes, stopped by Ctrl-C, and what it took."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

from bitnet_mlx.cli import options, speculation
from bitnet_mlx.cli.chat_thoughts import shown


def answer(
    session: Any, text: str, args: argparse.Namespace, backend: str, turns: list[dict[str, Any]], person: bool
) -> bool:
    """Show one answer and what it took; whether it came to its end. What was made of it stays in the history."""
    from bitnet_mlx.generation import Completion

    done = None
    with Stop(person) as stop:
        stream = session.reply(text, stop.watching(options.prefill_progress(args.verbose)))
        try:
            done = Completion.of(stop.until(stream if args.json else shown(session, stream)))
        except KeyboardInterrupt:
            if not stop.asked:
                raise
        finally:
            stream.close()  # the part that was made goes into the history now
    if not args.json:
        options.show("\n")
        print(statistics(done, session, backend), file=sys.stderr)
    if done:
        turns.append(done.record())
    return not stop.asked


def statistics(done: Any, session: Any, backend: str) -> str:
    """One line about an answer; done: its Completion, None where it was stopped before its first token."""
    if done is None:
        return "(stopped before the first word; the message is taken back)"
    return (
        f"[{backend}] {done.generation_tokens} tokens at {done.generation_tps:.1f}/s, first after {done.ttft_s:.2f} s "
        f"({done.finish_reason or 'stopped'}); context {session.positions} of {session.context}"
        f"{speculation.told(done.speculation)}"
    )


class Stop:
    """While it is entered, the first Ctrl-C of a person asks for the end of the answer, between two steps of the model, so
    that nothing is left half done; a second one interrupts at once. Elsewhere Ctrl-C is left as it is.
    """

    def __init__(self, person: bool) -> None:
        self._person, self.asked = person, False
        self._before: Any = None

    def __enter__(self) -> Stop:
        if self._person:
            self._before = signal.signal(signal.SIGINT, self._interrupted)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._person:
            signal.signal(signal.SIGINT, self._before)

    def _interrupted(self, *_: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def until(self, stream: Iterator[Any]) -> Iterator[Any]:
        """The stream, up to where the end is asked for."""
        for response in stream:
            yield response
            if self.asked:
                return

    def watching(self, progress: Callable[[int, int], None] | None) -> Callable[[int, int], None]:
        """A prompt's progress; it raises KeyboardInterrupt between two parts of the prompt once the end is asked for."""

        def tell(done: int, total: int) -> None:
            if progress:
                progress(done, total)
            if self.asked:
                raise KeyboardInterrupt

        return tell
