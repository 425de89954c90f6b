"""What fresh interpreters load: modules with the heavy packages refused, and the package and --help alone."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.support.structure.imports import LATE, allowed_at_load
from tests.support.structure.tree import PACKAGE, Breach, Tree

_REFUSE = """
import importlib, json, sys, traceback
root, late, names = json.loads(sys.argv[1])
sys.path.insert(0, root)

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in late:
            raise ImportError(f"{name} is refused here")

sys.meta_path.insert(0, Refuse())
failed = {}
for name in names:
    try:
        importlib.import_module(name)
    except Exception as error:
        failed[name] = f"{type(error).__name__}: {error}"
print(json.dumps(failed))
"""

_LOADED = """
import contextlib, io, json, sys
root, names, module, arguments = json.loads(sys.argv[1])
sys.path.insert(0, root)
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    main = __import__(module, fromlist=["main"])
    if arguments:
        main.main(arguments)
print(json.dumps(sorted(set(names) & {name.partition(".")[0] for name in sys.modules})))
"""


def _python(code: str, argument: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, json.dumps(argument)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def without_late_packages(tree: Tree) -> list[Breach]:
    """Every module that is not made of a heavy package is imported in one process where all of them are refused."""
    names = [n for n in tree.modules if not allowed_at_load(n) and n != f"{PACKAGE}.__main__"]
    if not (tree.root / PACKAGE / "metal_kernels").exists():  # it is there once the package is installed
        names = [n for n in names if n != f"{PACKAGE}.metal_kernels"]
    done = _python(_REFUSE, [str(tree.root), sorted(LATE), sorted(names)])
    if done.returncode:
        return [Breach(PACKAGE, 1, f"the import check failed: {done.stderr.strip()[-500:]}")]
    failed = json.loads(done.stdout.splitlines()[-1])
    return [
        Breach(tree.modules[n].path, 1, f"import {n} without {', '.join(sorted(LATE)[:4])}...: {e}")
        for n, e in failed.items()
    ]


def light_start(tree: Tree) -> list[Breach]:
    """`import bitnet_mlx` and `bitnet-mlx --help` load no numpy and nothing of LATE."""
    starts = {"import bitnet_mlx": [PACKAGE, []], "bitnet-mlx --help": [f"{PACKAGE}.cli.main", ["--help"]]}
    return _loaded_by(tree, starts, sorted({*LATE, "numpy"}))


def light_commands(tree: Tree) -> list[Breach]:
    """The help of each command loads no package of LATE: options are parsed before anything heavy is imported."""
    files = {name.rpartition(".")[2]: file for name, file in tree.modules.items() if name.startswith(f"{PACKAGE}.cli.")}
    commands = [name for name, file in files.items() if "def add_arguments" in (tree.root / file.path).read_text()]
    starts = {f"bitnet-mlx {c} --help": [f"{PACKAGE}.cli.main", [c, "--help"]] for c in commands}
    return _loaded_by(tree, starts, sorted(LATE))


def _loaded_by(tree: Tree, starts: dict[str, list[object]], names: list[str]) -> list[Breach]:
    breaches = []
    for label, start in starts.items():
        done = _python(_LOADED, [str(tree.root), names, *start])
        if done.returncode:
            breaches.append(Breach(PACKAGE, 1, f"{label} failed: {done.stderr.strip()[-500:]}"))
            continue
        loaded = json.loads(done.stdout.splitlines()[-1])
        if loaded:
            breaches.append(Breach(PACKAGE, 1, f"{label} loads {', '.join(loaded)}"))
    return breaches
