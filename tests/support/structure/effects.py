"""Importing a module changes nothing: no device, stream, limit, seed, environment, file or output."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from tests.support.structure.tree import Breach, Tree

# Calls by their last name, whatever they are called on.
FORBIDDEN_NAMES = frozenset(
    """
    set_default_device set_default_stream new_stream set_memory_limit set_cache_limit set_wired_limit
    seed seterr setrlimit putenv unsetenv setdefault filterwarnings simplefilter basicConfig
    set_num_threads setrecursionlimit set_start_method setlocale chdir umask
    print open read_text read_bytes write_text write_bytes mkdir unlink urlopen
    start run Popen system CDLL signal snapshot_download hf_hub_download
    """.split()
)
# MLX may be called at load for these alone: they only wrap a function.
MLX_WRAPPERS = frozenset(("compile", "custom_function", "checkpoint"))
MLX_ROOTS = frozenset(("mx", "mlx"))


def at_load(tree: Tree) -> list[Breach]:
    """No call that acts on the process or on a device runs while a module of the package is imported."""
    breaches = []
    for module in tree.modules.values():
        for node in _run_at_load(module.tree.body):
            problem = _problem(node)
            if problem and not module.name.endswith("__main__"):
                breaches.append(Breach(module.path, node.lineno, f"{problem} while {module.name} is imported"))
    return breaches


def _problem(node: ast.expr | ast.stmt) -> str:
    if isinstance(node, ast.Call):
        dotted = _dotted(node.func)
        last = dotted.rpartition(".")[2]
        if last in FORBIDDEN_NAMES:
            return f"calls {dotted}"
        if dotted.split(".")[0] in MLX_ROOTS and last not in MLX_WRAPPERS:
            return f"calls {dotted}"
    if (
        isinstance(node, ast.Subscript)
        and isinstance(node.ctx, (ast.Store, ast.Del))
        and _dotted(node.value) in ENVIRONMENTS
    ):
        return "changes the environment"
    return ""


ENVIRONMENTS = frozenset(("os.environ", "environ"))


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def _run_at_load(nodes: list[ast.AST] | list[ast.stmt]) -> Iterator[ast.expr | ast.stmt]:
    """Every node that is evaluated at import: not the bodies of functions, but their decorators and defaults."""
    for node in nodes:
        if isinstance(node, (ast.expr, ast.stmt)):
            yield node
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _run_at_load(
                [*node.decorator_list, *node.args.defaults, *[d for d in node.args.kw_defaults if d]]
            )
        elif isinstance(node, ast.Lambda):
            yield from _run_at_load([*node.args.defaults])
        elif isinstance(node, ast.If) and _is_main(node.test):
            continue
        else:
            yield from _run_at_load(list(ast.iter_child_nodes(node)))


def _is_main(test: ast.expr) -> bool:
    return isinstance(test, ast.Compare) and _dotted(test.left) == "__name__"
