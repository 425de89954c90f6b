"""clang, and the libraries it makes: the runtime once, each kernel's text once, kept by content in the user's cache folder."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.emulator import instrument
from tests.emulator.instrument import RefusedError
from tests.emulator.text import check_metal, rewritten
from tests.emulator.trace import mlx_headers
from tests.support.tally import here

_HERE = Path(__file__).parent
_RUNTIME = ("grid.cpp", "memory.cpp", "collectives.cpp", "floats.cpp", "signals.cpp")
_PRELUDE = '#include <metal_stdlib>\n#include "mlx/backend/metal/kernels/utils.h"\n'
_LANGUAGE = (
    "-x clcpp -cl-std=clc++2021 -cl-no-stdinc -Xclang -cl-ext=-all,+cl_khr_fp16,+__opencl_c_generic_address_space "
    "-Xclang -cl-single-precision-constant -Xclang -ffake-address-space-map -Xclang -fnative-half-type "
    "-Xclang -ffloat16-excess-precision=none "
    "-fno-math-errno -Wimplicit-float-conversion -Wno-implicit-int-float-conversion -Wno-unknown-attributes"
).split()
_CHECKS = (
    "-fsanitize=array-bounds,integer-divide-by-zero -fsanitize-trap=array-bounds,integer-divide-by-zero "
    "-ftrivial-auto-var-init=pattern"
).split()
_TO_BFLOAT = re.compile(r"implicit conversion .* to '[^']*(?:__bf16|bfloat)[^']*'")
FLAGS = ("fast_math", "split_fma", "contract", "flush_half", "flush_float")


@functools.lru_cache(maxsize=1)
def compiler() -> tuple[str, ...] | None:
    """The command of a clang of version 18 or newer, or None."""
    names = [(f"clang++-{n}",) for n in range(30, 17, -1)] + [("clang++",)]
    if zig := importlib.util.find_spec("ziglang"):  # a wheel with a clang of its own
        folder = (zig.submodule_search_locations or [""])[0]
        names.append((sys.executable, "-m", "ziglang", "clang", "-resource-dir", f"{folder}/lib"))
    return next((name for name in names if shutil.which(name[0]) and _version(name) >= 18), None)


def _version(command: tuple[str, ...]) -> int:
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
    match = re.search(r"clang version (\d+)", done.stdout)
    return int(match[1]) if match and "Apple" not in done.stdout else 0


def why_not() -> str:
    """Why no kernel can be emulated here, in one line; empty if it can."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        return "the emulator of Metal runs on Linux, on x86-64 and ARM64 processors"
    return "" if compiler() else "the emulator of Metal needs clang 18 or newer (Debian: apt-get install clang-19)"


@functools.lru_cache(maxsize=1)
def _processor() -> list[str]:
    if platform.machine() != "x86_64":
        return []
    have = set(re.findall(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[0].split())
    return ["-march=x86-64-v3"] if {"avx2", "fma", "f16c", "bmi2"} <= have else []


def _folder() -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bitnet-mlx" / "emulator"
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError:
        root = Path(tempfile.gettempdir()) / f"bitnet-mlx-emulator-{os.getuid()}"
        root.mkdir(mode=0o700, exist_ok=True)
    return root


@functools.lru_cache(maxsize=1)
def _base() -> str:
    """A hash of everything that every library depends on."""
    digest = hashlib.sha256(" ".join([*(compiler() or ()), *_LANGUAGE, *_processor()]).encode())
    digest.update(subprocess.run([*(compiler() or ()), "--version"], capture_output=True, check=True).stdout)
    digest.update(str(Path(__file__).resolve()).encode())  # the precompiled prelude names its files where they lie
    own = [_HERE / name for name in ("compiler.py", "instrument.py", "text.py")]
    own += [p for folder in ("metal", "runtime") for p in sorted((_HERE / folder).rglob("*")) if p.is_file()]
    for file in [*own, *sorted((mlx_headers() / "mlx/backend/metal/kernels").rglob("*.h"))]:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _run(arguments: list[str], text: str | None = None) -> str:
    command = [*(compiler() or ()), *arguments]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line][:4]
        raise RefusedError("the compiler refuses the text: " + ("\n".join(errors) or done.stderr[-2000:]))
    if narrowed := [line for line in done.stderr.splitlines() if _TO_BFLOAT.search(line)]:
        raise RefusedError("Metal converts nothing to bfloat by itself: " + "\n".join(narrowed[:4]))
    return done.stdout


@functools.lru_cache(maxsize=1)
def runtime() -> ctypes.CDLL:
    """The runtime's library, loaded for the kernels' libraries to find."""
    path = _folder() / f"runtime-{_base()[:24]}.so"
    if not path.exists():
        _prune()
        flags = [
            "-std=c++17",
            "-O2",
            "-fPIC",
            "-shared",
            "-fno-exceptions",
            "-fno-rtti",
            "-Wall",
            "-Werror",
            *_processor(),
        ]
        _made(
            path,
            lambda out: _run(
                [*flags, *(str(_HERE / "runtime" / name) for name in _RUNTIME), "-ldl", "-lm", "-lrt", "-o", out]
            ),
        )
    return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


def _prune() -> None:
    """Take out what has not been made anew for two weeks, as often as the emulator itself changes."""
    for old in _folder().iterdir():
        if time.time() - old.stat().st_mtime > 14 * 86400:
            old.unlink(missing_ok=True)


def kernel(text: str, flags: tuple[str, ...]) -> ctypes.CDLL:
    """The library of a text that has `emulator_entry`. Raises RefusedError, with the compiler's first errors."""
    unknown = set(flags) - set(FLAGS)
    assert not unknown, f"no such flag: {', '.join(sorted(unknown))}; there are {', '.join(FLAGS)}"
    check_metal(text)
    return _kernel(text, tuple(sorted(flags)))


@functools.lru_cache(maxsize=512)
def _kernel(text: str, flags: tuple[str, ...]) -> ctypes.CDLL:
    runtime()
    key = hashlib.sha256("\0".join([_base(), text, *flags]).encode()).hexdigest()[:32]
    path = _folder() / f"kernel-{key}.so"
    if not path.exists():
        _made(path, lambda out: _build(text, flags, out))
    here.kernels.add(path.name)
    here.by = here.by or f"clang {_version(compiler() or ('false',))}"
    return ctypes.CDLL(str(path))


def ir(text: str, options: Sequence[str]) -> str:
    """LLVM IR of a text, address spaces and all, made with more of clang's options: for counting instructions."""
    language = [*_LANGUAGE, *_processor(), "-I", str(_HERE / "metal"), "-I", str(mlx_headers()), *options]
    whole = _run([*language, "-E", "-", "-o", "-"], _PRELUDE + text)
    return _run([*language, "-w", "-S", "-emit-llvm", "-", "-o", "-"], rewritten(whole))


def _build(text: str, flags: tuple[str, ...], out: str) -> None:
    own = '#line 1 "kernel"\n' + text
    if "#include" in text:  # MLX's own headers are to be rewritten too; what stands before is parsed already
        whole = _run([*_language(flags), "-E", "-", "-o", "-"], _PRELUDE + own)
        own = whole[whole.index('# 1 "kernel"') :]
    language = [*_language(flags), "-include-pch", str(_prelude(flags))]
    unoptimised = ["-Xclang", "-disable-llvm-passes", "-S", "-emit-llvm"]
    ready = instrument.instrument(_run([*language, *unoptimised, "-", "-o", "-"], rewritten(own)), flags)
    contract = "-ffp-contract=fast" if "contract" in flags else "-ffp-contract=off"
    # Unrolled loops change no result, unless the compiler may reorder floats, and are most of the compiler's work.
    loops = [] if {"fast_math", "contract"} & set(flags) else ["-mllvm", "-unroll-threshold=0"]
    # The runtime has brought the C and maths libraries: linking a program's usual ones again takes as long as a kernel.
    libraries = ["-shared", "-nostdlib", "-", "-lgcc"]
    _run(["-x", "ir", "-O1", "-fPIC", "-w", contract, *loops, *_processor(), *libraries, "-o", out], ready)


def _language(flags: tuple[str, ...]) -> list[str]:
    contract = {"fast_math": "-ffast-math", "contract": "-ffp-contract=fast"}
    options = [contract[flag] for flag in flags if flag in contract] or ["-ffp-contract=off"]
    options += [f"-DEMULATOR_{flag.upper()}" for flag in flags]
    return [
        *_LANGUAGE,
        *_CHECKS,
        *_processor(),
        "-I",
        str(_HERE / "metal"),
        "-I",
        str(mlx_headers()),
        "-O2",
        "-fPIC",
        *options,
    ]


def _prelude(flags: tuple[str, ...]) -> Path:
    """What stands before every kernel, parsed once: half of a kernel's time otherwise."""
    path = _folder() / f"prelude-{_base()[:24]}-{'-'.join(flags) or 'plain'}.pch"
    if not path.exists():
        header = path.with_suffix(".h")
        _made(header, lambda out: Path(out).write_text(_PRELUDE))
        _made(
            path,
            lambda out: _run(
                [
                    *_language(flags),
                    "-fsyntax-only",
                    "-Xclang",
                    "-emit-pch",
                    "-Xclang",
                    "-fno-pch-timestamp",  # a checkout made again has other dates; contents are in the path
                    "-Xclang",
                    "-o",
                    "-Xclang",
                    out,
                    str(header),
                ]
            ),
        )
    return path


def _made(path: Path, build: object) -> None:
    """Build under another name and rename: two test runs may build the same library at once."""
    scratch = path.with_suffix(f".{os.getpid()}.tmp")
    build(str(scratch))  # type: ignore[operator]
    scratch.replace(path)
