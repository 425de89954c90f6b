"""Tasks of EleutherAI's lm-evaluation-harness (the package lm-eval, extra `eval`), asked of our own engines."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from bitnet_mlx.errors import ConfigError
from bitnet_mlx.models.decoder import Decoder
from bitnet_mlx.quality.requests import Answers
from bitnet_mlx.tokenizer import Tokenizer

_RESAMPLES = 1000  # of a bootstrap, for the standard error of metrics that have no formula for it
_NO_FORKS = "DISABLE_MULTIPROC"
Progress = Callable[[int, int], None]  # requests answered, in all of a kind


@dataclass(frozen=True)
class TaskOptions:
    """tasks: names that lm-eval knows, or of YAML files in include_path. limit: samples of each task."""

    tasks: tuple[str, ...]
    num_fewshot: int | None = None
    include_path: Path | None = None
    apply_chat_template: bool = False
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise ConfigError(f"[evaluate] --num-fewshot is {self.num_fewshot}; 0 or more is allowed")
        if self.include_path is not None and not self.include_path.is_dir():
            raise ConfigError(
                f"[evaluate] no folder {self.include_path}; --include-path takes one with tasks' YAML files"
            )


def check_installed() -> None:
    """Raises ConfigError where lm-eval is missing."""
    import importlib.util

    if not importlib.util.find_spec("lm_eval"):
        raise ConfigError("[evaluate] --tasks needs the package lm-eval; pip install 'bitnet-mlx[eval]'")


def run_tasks(
    decoder: Decoder, tokenizer: Tokenizer, options: TaskOptions, progress: Progress | None = None
) -> dict[str, Any]:
    """By task, its metrics as lm-eval names them ("acc,none": 0.5), their standard errors, and its number of samples.

    Raises ConfigError for a task that lm-eval does not know, or where it is missing.
    """
    check_installed()
    task_manager = import_module("lm_eval.tasks").TaskManager
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    folder = None if options.include_path is None else str(options.include_path)
    # Its own tasks fill thousands of files, which are looked through only where they are asked for.
    manager = task_manager(include_path=folder, include_defaults=folder is None)
    unknown = [name for name in options.tasks if name not in manager.all_tasks]
    if unknown and folder is not None:
        manager = task_manager(include_path=folder)
        unknown = [name for name in unknown if name not in manager.all_tasks]
    if unknown:
        raise ConfigError(
            f"[evaluate] lm-eval knows no task {unknown[0]!r}; it knows {len(manager.all_tasks)}, and those whose YAML "
            "files lie in --include-path"
        )
    model = language_model(Answers(decoder, tokenizer), progress)
    with redirect_stdout(sys.stderr), _alone():
        found: Any = import_module("lm_eval").simple_evaluate(
            model=model, tasks=list(options.tasks), task_manager=manager, num_fewshot=options.num_fewshot,
            limit=options.limit, apply_chat_template=options.apply_chat_template, log_samples=False,
            bootstrap_iters=_RESAMPLES,
        )  # fmt: skip
    return {
        name: {
            "samples": found["n-samples"].get(name, {}).get("effective"),
            "version": found["versions"].get(name),
            "num_fewshot": found["n-shot"].get(name),
            "metrics": {key: value for key, value in metrics.items() if "," in key},
        }
        for name, metrics in found["results"].items()
    }


@contextmanager
def _alone() -> Iterator[None]:
    """Within, lm-eval resamples in this process: forked ones do not survive a threaded engine."""
    before = os.environ.get(_NO_FORKS)
    os.environ[_NO_FORKS] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_NO_FORKS]
        else:
            os.environ[_NO_FORKS] = before


def language_model(answers: Answers, progress: Progress | None = None) -> Any:
    """An lm_eval.api.model.LM over a decoder: loglikelihood, loglikelihood_rolling and generate_until."""
    LM: Any = import_module("lm_eval.api.model").LM

    class BitnetLM(LM):
        """Requests are answered one after another, those with the same beginning next to each other."""

        tokenizer_name = "bitnet-mlx"

        def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
            pairs = [answers.encode_pair(*request.args) for request in requests]
            order = sorted(range(len(pairs)), key=lambda i: pairs[i])
            found = {}
            for done, i in enumerate(order, 1):
                found[i] = answers.log_likelihood(*pairs[i])
                self.cache_hook.add_partial("loglikelihood", requests[i].args, found[i])
                _tell(progress, done, len(order))
            return [found[i] for i in range(len(pairs))]

        def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
            return [self._each(answers.text_log_likelihood, r, i, len(requests)) for i, r in enumerate(requests, 1)]

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            return [self._each(answers.generate, r, i, len(requests)) for i, r in enumerate(requests, 1)]

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            return answers.tokenizer.render_chat_template(chat_history, add_generation_prompt=add_generation_prompt)

        def chat_template(self, chat_template: bool | str = False) -> str | None:
            return answers.tokenizer.chat_template if chat_template else None

        @staticmethod
        def _each(answer: Callable[..., Any], request: Any, done: int, total: int) -> Any:
            found = answer(*request.args)
            _tell(progress, done, total)
            return found

    return BitnetLM()


def _tell(progress: Progress | None, done: int, total: int) -> None:
    if progress is not None:
        progress(done, total)


def table(tasks: dict[str, Any]) -> list[str]:
    """A line a metric, for a terminal."""
    lines = []
    for name, task in tasks.items():
        metrics = task["metrics"]
        for key, value in metrics.items():
            metric, _, chosen = key.partition(",")
            if metric.endswith("_stderr"):
                continue
            error = metrics.get(f"{metric}_stderr,{chosen}")
            spread = f" +- {error:.4f}" if isinstance(error, float) else ""
            shown = f"{value:.4f}" if isinstance(value, (int, float)) else str(value)
            lines.append(f"  {name}: {metric} {shown}{spread} ({task['samples']} samples)")
    return lines
