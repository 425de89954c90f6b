"""Text documents for training: found in files and folders, decoded strictly, exact duplicates dropped."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bitnet_mlx.errors import ConfigError, FormatError

SUFFIXES = (".py", ".txt", ".md", ".rst")


@dataclass(frozen=True)
class Document:
    """One file's text."""

    name: str
    text: str

    @property
    def digest(self) -> bytes:
        """SHA-256 of the UTF-8 text: equal for exact duplicates."""
        return hashlib.sha256(self.text.encode()).digest()


@dataclass
class Corpus:
    """Documents in a fixed order, and what was left out on the way."""

    documents: list[Document]
    duplicates: int = 0
    not_utf8: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of UTF-8 text."""
        return sum(len(d.text.encode()) for d in self.documents)

    def split(self, fraction: float) -> tuple[Corpus, Corpus]:
        """(training, held out): whole documents, chosen by their digest, so the choice does not depend on order.

        At least one document stays on each side if there are two or more.
        """
        ranked = sorted(self.documents, key=lambda d: d.digest)
        count = round(len(ranked) * fraction)
        count = min(max(count, 1), len(ranked) - 1) if fraction > 0 else 0
        held = {d.digest for d in ranked[:count]}
        train = [d for d in self.documents if d.digest not in held]
        return Corpus(train, self.duplicates, self.not_utf8), Corpus([d for d in self.documents if d.digest in held])


def find_files(paths: Sequence[str | Path]) -> list[Path]:
    """Files as given, and every .py, .txt, .md and .rst file under each folder, sorted by path.

    Raises ConfigError where a path does not exist or nothing is found.
    """
    files: list[Path] = []
    for given in map(Path, paths):
        if given.is_dir():
            files += sorted(p for p in given.rglob("*") if p.suffix in SUFFIXES and p.is_file())
        elif given.is_file():
            files.append(given)
        else:
            raise ConfigError(f"[train] no file or folder at {given}; give text files, folders of them, or token ids")
    if not files:
        raise ConfigError(
            f"[train] no text under {', '.join(map(str, paths))}; "
            f"folders are searched for {', '.join(SUFFIXES)}; name other files one by one"
        )
    return files


def read_corpus(files: Iterable[Path], exclude: Iterable[bytes] = ()) -> Corpus:
    """Read documents, dropping empty ones, files that are not UTF-8 (counted) and exact duplicates (counted).

    exclude: digests of documents that must not appear, such as held-out ones. Raises FormatError if nothing is left.
    """
    corpus, seen = Corpus([]), set(exclude)
    for path in files:
        try:
            # Line ends are made uniform, so that a copy with other ends is a duplicate.
            text = path.read_bytes().decode("utf-8").replace("\r\n", "\n")
        except UnicodeDecodeError:
            corpus.not_utf8 += 1
            continue
        document = Document(str(path), text)
        if not text.strip():
            continue
        if document.digest in seen:
            corpus.duplicates += 1
            continue
        seen.add(document.digest)
        corpus.documents.append(document)
    if not corpus.documents:
        raise FormatError(
            f"[train] the data holds no usable text ({corpus.not_utf8} files are not UTF-8, {corpus.duplicates} are "
            "duplicates, the others are empty); give UTF-8 text"
        )
    return corpus
