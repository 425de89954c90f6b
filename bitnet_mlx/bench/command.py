"""What `bitnet-mlx bench` does with its options: measure, compare, keep."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from bitnet_mlx.bench.stamp import append
from bitnet_mlx.errors import ConfigError

Done = tuple[Mapping[str, Any], Iterable[str], int]  # the record, its lines, the exit code


def measured(what: str, asked: Mapping[str, Any]) -> Done:
    """Measure. asked: the command's options by name. Raises ConfigError, BackendError, NoBaselineError (exit 2)."""
    _check(what, asked)
    return _MEASURES[what](asked)


def check_used(what: str, asked: Mapping[str, Any]) -> None:
    """Raises ConfigError for an option that was given (is not None) and that `what` does not use."""
    model = ("preset", "model", "layers", "head_bits", "dtype", "prompt", "tokens", "repeats", "threads")
    used = {
        "matmul": ("rows",), "precision": ("model", "text", "tokens", "repeats"), "decode": (*model, "against"),
        "backends": model, "analysis": (*model, "only", "plot"), "regression": (*model, "compare"),
    }  # fmt: skip
    others = {name for names in used.values() for name in names} - {"plot", "compare"}
    wrong = [f"--{name.replace('_', '-')}" for name in sorted(others - {*used[what]}) if asked.get(name) is not None]
    if wrong:
        raise ConfigError(f"[bench] {what} does not use {', '.join(wrong)}; leave it out")
    record = asked.get("record")
    if record and (Path(record).is_dir() or not Path(record).absolute().parent.is_dir()):
        raise ConfigError(f"[bench] --record {record} is a folder, or lies in one that is not there; name a file")


def keep(record: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Append the record to --record's file and draw --plot's picture. Raises OSError."""
    if asked.get("record"):
        append(record, asked["record"])
    if asked.get("plot"):
        from bitnet_mlx.profile.plots import draw

        draw(_drawn(record), asked["plot"])


def _drawn(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of an analysis that has a picture: scaling, else the memory of its run."""
    part = "scaling" if "scaling" in record else "memory"
    return {**record, **record[part], "bench": part}


def _check(what: str, asked: Mapping[str, Any]) -> None:
    from bitnet_mlx.bench.analysis.measure import DECIDE

    if asked.get("plot"):
        from bitnet_mlx.profile.plots import check_path

        check_path(asked["plot"])
        if what != "analysis" or not {"scaling", "memory"} & set(asked["only"]):
            raise ConfigError("[bench] --plot draws the scaling or the memory of an analysis; use bench analysis")
    unknown = [name for name in asked["only"] if name not in DECIDE]
    if unknown:
        raise ConfigError(f"[bench] --only names {', '.join(unknown)}; {', '.join(DECIDE)} are known")
    if asked.get("compare") and what != "regression":
        raise ConfigError(f"[bench] --compare goes with regression, not with {what}")


def _options(asked: Mapping[str, Any]) -> Any:
    from bitnet_mlx.bench.decode import DecodeOptions

    return DecodeOptions(**{name: asked[name] for name in DecodeOptions.__dataclass_fields__})


def _matmul(asked: Mapping[str, Any]) -> Done:
    from bitnet_mlx.bench import matmul

    record = matmul.measure(asked["backend"], asked["rows"])
    return record, matmul.lines(record), 0 if record["exact"] else 1


def _decode(asked: Mapping[str, Any]) -> Done:
    from bitnet_mlx.bench import decode

    record = decode.measure(_options(asked))
    return record, decode.lines(record), 0


def _backends(asked: Mapping[str, Any]) -> Done:
    from bitnet_mlx.bench.comparison import measure

    record = measure.measure(_options(asked))
    return record, measure.lines(record), 0 if record["equality"]["ok"] else 1


def _analysis(asked: Mapping[str, Any]) -> Done:
    from bitnet_mlx.bench.analysis import measure

    record = measure.measure(_options(asked), asked["only"])
    return record, measure.lines(record), 0


def _regression(asked: Mapping[str, Any]) -> Done:
    from bitnet_mlx.bench import regression

    record, again = regression.measure(_options(asked))
    if not asked["compare"]:
        return record, regression.lines(record), 0
    baseline = regression.find_baseline(asked["compare"], record)
    record["comparison"] = regression.compare(record, baseline, again)
    return record, regression.lines(record), 1 if record["comparison"]["regressed"] else 0


def _precision(asked: Mapping[str, Any]) -> Done:
    from bitnet_mlx.bench import precision

    record = precision.measure(
        asked["backend"], asked["model"], asked["text"], asked["tokens"], repeats=asked["repeats"]
    )
    return record, precision.lines(record), 0


_MEASURES: dict[str, Callable[[Mapping[str, Any]], Done]] = {
    "matmul": _matmul, "decode": _decode, "backends": _backends, "analysis": _analysis, "regression": _regression,
    "precision": _precision,
}  # fmt: skip
