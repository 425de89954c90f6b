"""From a path or a Hugging Face name to a folder or a GGUF file: what is on the disk wins, else the hub, else its cache.

Only data is fetched (safetensors, GGUF, JSON, tokenizer models, templates, text), never pickles or code.
"""

from __future__ import annotations

import logging
import os
import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from bitnet_mlx.checkpoint.folder import ADAPTER, INDEX, PICKLES, SINGLE, first_names, read_config, weight_files
from bitnet_mlx.errors import ConfigError, FormatError

log = logging.getLogger(__name__)

# Of folders those of sentence-transformers' modules alone: 1_Pooling/config.json.
IGNORED = ("[!1]*/*", "1[!_]*/*")
WEIGHTS = "model*.safetensors"
ALLOWED = ("*.json", WEIGHTS, "tokenizer.model", "spiece.model", "*.jinja", "*.txt")
NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_URL = re.compile(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/([^/\s]+/[^/\s?#]+)(?:[/?#].*)?")
_GGUF = re.compile(rf"({NAME.pattern})/([\w.-][\w. /-]*\.gguf)")


def resolve(path_or_repo: str | Path, revision: str | None = None, progress: bool = True) -> Path:
    """The folder that holds a model, or the GGUF file that is one.

    path_or_repo: a path that exists, "owner/name" on the Hugging Face hub, or "owner/name/FILE.gguf" there. Where a folder
    or a repository has no safetensors and one GGUF file, that is the model. revision: a branch, tag or commit there.
    progress: whether download bars are drawn (on stderr). Without a network or with HF_HUB_OFFLINE=1 the cache serves.

    Raises ConfigError where there is no such folder, model or revision, or it cannot be reached, and FormatError where
    the cache holds only a part of the model, naming the missing files.
    """
    name = os.fspath(path_or_repo)
    if not name.strip():
        raise ConfigError("[hub] the model's name is empty; give a model folder or a Hugging Face name (owner/name)")
    path = Path(name).expanduser()
    if os.path.exists(path):  # False where the system cannot even look, such as for a name too long
        if revision is not None:
            raise ConfigError(
                f"[hub] revision {revision!r} was given, but {path} is on this disk; leave out the revision"
            )
        return _only_gguf(path, name) or path
    file = _GGUF.fullmatch(name)
    if url := _URL.fullmatch(name):
        raise ConfigError(f"[hub] {name} is an address; give the model's name alone: {url[1]}")
    if not NAME.fullmatch(name) and not (file and ".." not in name):
        raise ConfigError(
            f"[hub] there is no file or folder {name}, and it is no Hugging Face name (owner/name); "
            f"give a model folder or such a name{_beside(name)}"
        )
    if revision is not None and not revision.strip():
        raise ConfigError("[hub] the revision is empty; give a branch, a tag or a commit, or leave it out")
    if file:
        return _gguf(file[1], file[2], revision, progress)
    if not _cached(name, revision, SINGLE, INDEX):
        only = _gguf_of(name, _listing(name, revision))
        if only is not None:
            return _gguf(name, only, revision, progress)
    folder = _snapshot(name, revision, progress)
    found = _only_gguf(folder, name)
    if found is not None:
        return found
    read_config(folder)
    weight_files(folder)
    return folder


def _beside(name: str) -> str:
    """For a path that is not there: the names in its folder, where that is on this disk."""
    folder = Path(name).expanduser().parent
    if folder in (Path(), Path("/")) or not folder.is_dir():
        return ""
    there = (path for path in folder.iterdir() if not path.name.startswith("."))
    found = sorted(path.name for path in there if path.is_dir() or path.suffix == ".gguf")
    return f". The folder {folder} here holds {first_names(found)}" if found else ""


def _only_gguf(folder: Path, name: str) -> Path | None:
    """The GGUF file of a folder that holds no other weights, or None. ConfigError where there are several."""
    if not folder.is_dir() or any(folder.glob("*.safetensors*")):
        return None
    files = sorted(path.name for path in folder.glob("*.gguf") if path.is_file())
    return folder / _one(files, name) if files else None


def _one(files: list[str], name: str) -> str:
    if len(files) > 1:
        choices = ", ".join(f"{name}/{file}" for file in files[:12])
        raise ConfigError(f"[hub] {name} holds {len(files)} GGUF files; give one of them: {choices}")
    return files[0]


def _gguf_of(name: str, listed: list[str]) -> str | None:
    """The GGUF file that is the model of a repository with these files; None where safetensors are, or nothing is known.

    ConfigError where there are several, FormatError where the repository holds no model.
    """
    if not listed or any(fnmatch(file, WEIGHTS) for file in listed):
        return None
    files = [file for file in listed if file.endswith(".gguf")]
    if files:
        return _one(files, name)
    why = ""
    if ADAPTER in listed:
        why = f". It is an adapter: fetch it (`hf download {name} --local-dir DIR`), and give DIR as --adapter-path and its base "
        why += "as --model"
    elif pickles := [file for file in listed if Path(file).suffix in PICKLES]:
        why = f". Pickles such as {pickles[0]} can run code and are never read: transformers' model.save_pretrained(DIR) writes "
        why += "safetensors"
    raise FormatError(f"[hub] {name} has no {SINGLE}, no {INDEX} and no GGUF file; it holds {first_names(listed)}{why}")


def _cached(name: str, revision: str | None, *files: str) -> bool:
    """Whether one of these files is in the cache."""
    from huggingface_hub import try_to_load_from_cache

    return any(isinstance(try_to_load_from_cache(name, file, revision=revision), str) for file in files)


def _gguf(name: str, file: str, revision: str | None, progress: bool) -> Path:
    """One file of a repository."""
    if not _cached(name, revision, file):
        listed = _listing(name, revision)
        if listed and file not in listed:
            files = [text for text in listed if text.endswith(".gguf")]
            raise ConfigError(f"[hub] {name} has no file {file}; its GGUF files are {', '.join(files[:12]) or 'none'}")
    path = _snapshot(name, revision, progress, (file,)) / file
    if not path.is_file():
        raise ConfigError(
            f"[hub] {file} of {name} is not in the cache, and the hub {_unreachable()}; check the name, or connect"
        )
    return path


def _listing(name: str, revision: str | None) -> list[str]:
    """Names of a repository's files; empty where the hub cannot be asked."""
    from huggingface_hub import HfApi, errors

    try:  # list_repo_files would ask an unreachable hub again and again, for a quarter of a minute
        return [file.rfilename for file in HfApi().model_info(name, revision=revision or "main").siblings or []]
    except (OSError, errors.OfflineModeIsEnabled, http_error()) as error:
        log.debug("%s: its files cannot be listed: %s", name, one_line(error))
        return []


def _snapshot(name: str, revision: str | None, progress: bool, patterns: tuple[str, ...] = ALLOWED) -> Path:
    """huggingface_hub's snapshot of a model, its errors told in our words. patterns: of the files that are fetched."""
    from huggingface_hub import errors, snapshot_download

    at = f"{name} at revision {revision}" if revision else name
    options: dict[str, Any] = {} if progress else {"tqdm_class": _silent_bar()}
    incomplete = getattr(errors, "IncompleteSnapshotError", ())  # since huggingface_hub 2
    try:
        found = snapshot_download(
            name,
            revision=revision,
            allow_patterns=list(patterns),
            ignore_patterns=list(IGNORED) if patterns is ALLOWED else None,
            **options,
        )
    except errors.HFValidationError as error:
        raise ConfigError(f"[hub] {name} is no valid Hugging Face name: {one_line(error)}") from error
    except errors.GatedRepoError as error:
        raise ConfigError(
            f"[hub] {name} is gated: accept its terms on its page, then log in with `hf auth login` or set HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ConfigError(
            f"[hub] there is no folder {name} here and no model {name} on the hub (or it is private: log in with "
            f"`hf auth login`); check the name{_beside(name)}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ConfigError(f"[hub] {name} has no revision {revision}; give a branch, a tag or a commit of it") from error
    except incomplete as error:
        return _usable(at, error, patterns)
    except errors.LocalEntryNotFoundError as error:
        raise ConfigError(
            f"[hub] there is no folder {name} here, {at} is not in the cache, and the hub {_unreachable()}; "
            f"check the name, connect, or give a model folder{_beside(name)}"
        ) from error
    except (OSError, http_error()) as error:  # a connection that broke half way, a full disk
        raise ConfigError(
            f"[hub] {at} could not be fetched: {one_line(error)}; try again, what is here is kept"
        ) from error
    return Path(found)


def _usable(at: str, error: Any, patterns: tuple[str, ...]) -> Path:
    """A cached snapshot that lacks files: used where it has the config and every weight file, else FormatError."""
    folder = Path(error.snapshot_path)
    if patterns is not ALLOWED or any(folder.glob("*.gguf")):
        return folder  # a GGUF file is a model by itself
    try:
        read_config(folder)
        weight_files(folder)
    except FormatError as cause:
        raise FormatError(
            f"[hub] the cached copy of {at} is incomplete, and the hub {_unreachable()}. {cause}"
        ) from error
    log.warning("%s: the cached copy lacks some files, but has the config and all weights; it is used", at)
    return folder


def repository(path_or_repo: str | Path) -> str | None:
    """The hub's owner/name that `resolve` would ask for, or None where it would not ask."""
    name = os.fspath(path_or_repo)
    if os.path.exists(Path(name).expanduser()):
        return None
    file = _GGUF.fullmatch(name)
    return file[1] if file else name if NAME.fullmatch(name) else None


def http_error() -> type[Exception]:
    """The root of the errors of huggingface_hub's HTTP library, whichever that is."""
    from huggingface_hub import errors

    return errors.HfHubHTTPError.__bases__[0]


def _unreachable() -> str:
    """Why the hub does not answer, after "the hub"."""
    return "may not be asked (HF_HUB_OFFLINE is set)" if offline() else "cannot be reached"


def offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids to ask the hub."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _silent_bar() -> type:
    from huggingface_hub.utils import tqdm

    class Silent(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})

    return Silent


def one_line(error: BaseException) -> str:
    """An error's text on one line."""
    return " ".join(str(error).split()) or type(error).__name__
