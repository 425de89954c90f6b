"""A converted model, and a card that tells what it is, to a repository on the Hugging Face hub."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from shlex import quote
from typing import Any

from bitnet_mlx import __version__
from bitnet_mlx.checkpoint.hub import NAME, http_error, offline, one_line, repository
from bitnet_mlx.errors import ConfigError, HubError

CARD = "README.md"
# The library that the hub names beside a model; of the formats not here it is this one.
_LIBRARIES = {
    "hf": "transformers",
    "hf-float": "transformers",
    "gguf-tq1_0": "gguf",
    "gguf-tq2_0": "gguf",
    "mlx-2bit": "mlx",
}
_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN to a token with write access"


@dataclass(frozen=True)
class Uploaded:
    """Where a model went. commit: the revision that holds it. files: their names there."""

    repo: str
    url: str
    commit: str
    files: tuple[str, ...]

    def record(self) -> dict[str, Any]:
        """The JSON record."""
        return asdict(self)


class Upload:
    """An upload that is to be: made before the conversion, so that what cannot work is refused before the work."""

    def __init__(self, repo: str, hf_path: str | Path) -> None:
        """repo: owner/name on the hub, made if it is not there. hf_path: the model that is converted.

        Asks no network. Raises ConfigError for a name of another form, without a token, and with HF_HUB_OFFLINE=1.
        """
        _check_name(repo)
        if offline():
            raise ConfigError(
                f"[upload] --upload-repo is {repo}, and HF_HUB_OFFLINE forbids to reach the hub; unset one of them"
            )
        from huggingface_hub import get_token

        self._token = get_token()
        if not self._token:
            raise ConfigError(f"[upload] {repo} needs a Hugging Face token and there is none; {_LOG_IN}")
        self.repo, self.base_model = repo, repository(hf_path)

    def send(self, path: str | Path, format: str) -> Uploaded:  # noqa: A002 - convert's name for it
        """Upload a folder's files, or a GGUF file, in one commit. format: as convert wrote it.

        A card is added where neither the folder nor the repository has one. Raises HubError; nothing on this disk changes.
        """
        from huggingface_hub import CommitOperationAdd, HfApi

        path, api = Path(path), HfApi(token=self._token)
        found = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        base = path if path.is_dir() else path.parent
        files: dict[str, str | bytes] = {file.relative_to(base).as_posix(): str(file) for file in found}
        try:
            url = api.create_repo(self.repo, exist_ok=True)
            if CARD not in files and not api.file_exists(self.repo, CARD):
                files[CARD] = card(self.repo, format, self.base_model).encode()
            additions = [CommitOperationAdd(name, content) for name, content in files.items()]
            message = f"Upload a {format} model with bitnet-mlx {__version__}"
            commit = api.create_commit(self.repo, additions, commit_message=message)
        # ValueError and RuntimeError are what the client makes of failed transfers.
        except (OSError, ValueError, RuntimeError, http_error()) as error:
            raise HubError(
                f"[upload] {path} was not uploaded to {self.repo}: {self._reason(error)}. The converted model stays in "
                f"{path}; to upload it without converting again: hf upload {self.repo} {quote(str(path))}"
            ) from error
        return Uploaded(self.repo, str(url), str(commit.oid), tuple(sorted(files)))

    def _reason(self, error: Exception) -> str:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status == 401:
            return f"the hub does not know the token (401): {_LOG_IN}"
        if status == 403:
            owner = self.repo.partition("/")[0]
            return f"the token may not write there (403): take one with write access to {owner}'s models"
        return one_line(error)


def _check_name(repo: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    why = "it is not OWNER/NAME"
    if NAME.fullmatch(repo):
        try:
            validate_repo_id(repo)
        except HFValidationError as error:
            why = one_line(error)
        else:
            return
    raise ConfigError(
        f"[upload] --upload-repo is {repo!r}: {why}; give your name on the hub or an organisation's, a slash, and a name"
    )


def card(repo: str, format: str, base_model: str | None) -> str:  # noqa: A002
    """A model card: the metadata that the hub reads, and how to run the model. base_model: owner/name, where it has one."""
    library = _LIBRARIES.get(format, "bitnet-mlx")
    tags = ["ternary", "bitnet-mlx", *(["mlx"] if library in ("bitnet-mlx", "mlx") else [])]
    lines = ["---", f"library_name: {library}", "pipeline_tag: text-generation"]
    lines += [f"base_model: {base_model}"] if base_model else []
    lines += ["tags:", *(f"- {tag}" for tag in tags), "---", "", f"# {repo}", ""]
    source = f"[{base_model}](https://huggingface.co/{base_model})" if base_model else "a local model"
    lines += [f"Converted from {source} to `{format}` with bitnet-mlx {__version__}.", ""]
    lines += ["```sh", f"bitnet-mlx generate --model {repo} --prompt 'Hello'", "```", ""]
    return "\n".join(lines)
