"""What a person can tell the chat itself."""

from __future__ import annotations

import sys
from typing import Any

from bitnet_mlx.errors import ConfigError

LEAVING = "Ctrl-C stops an answer, what was said stays; Ctrl-C again, Ctrl-D or /exit leaves."
_HELP = f"""\
/clear       forget the conversation (also /reset)
/save FILE   write it to a file, with all that is computed of it
/load FILE   go on with a saved one
/help        this text
/exit        leave (also /quit)
A line that ends with \\ goes on in the next one; \"\"\" begins a text of several lines, as it is typed, up to the next \"\"\".
A message that begins with / is sent as text from within \"\"\".
{LEAVING}"""


def obey(line: str, session: Any, model: str) -> bool:
    """Do what the line says; False where it says to leave. Raises ConfigError for what is no command, and what saving and
    loading raise.
    """
    name, _, rest = line.partition(" ")
    rest = rest.strip()
    if name in ("/exit", "/quit"):
        return False
    if name in ("/clear", "/reset"):
        session.reset()
        _tell("the conversation is forgotten")
    elif name == "/help":
        _tell(_HELP)
    elif name in ("/save", "/load"):
        if not rest:
            raise ConfigError(f"[chat] {name} needs a file: {name} FILE")
        if name == "/save":
            _tell(f"{rest}: {session.save(rest, model)} bytes, {session.positions} tokens")
        else:
            session.load(rest, model)
            _tell(f"{rest}: {len(session.messages)} messages, {session.positions} tokens")
    else:
        raise ConfigError(f'[chat] {name} is no command; /help lists them, and """ sends it as text')
    return True


def _tell(text: str) -> None:
    print(text, file=sys.stderr)
