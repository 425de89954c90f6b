"""Runs a notebook's code cells in order in one namespace, as a kernel would, and keeps what they show.

    python -m tests.support.notebook FILE.ipynb      run it and write its outputs into it

A cell's last expression is its result: text, and HTML where the object offers `_repr_html_`. No magics, no display().
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any


def cells(path: Path) -> dict[str, Any]:
    """The notebook, of format 4. Raises ValueError for a file that Jupyter would not open."""
    book = json.loads(path.read_text(encoding="utf-8"))
    if book.get("nbformat") != 4 or not isinstance(book.get("metadata"), dict):
        raise ValueError(f"{path} is no notebook of format 4")
    for cell in book["cells"]:
        needed = {"cell_type", "id", "metadata", "source"}
        needed |= {"outputs", "execution_count"} if cell.get("cell_type") == "code" else set()
        if set(cell) != needed:
            raise ValueError(f"a cell of {path} has {sorted(cell)}; {sorted(needed)} are needed")
    return book


def run(book: dict[str, Any]) -> dict[str, Any]:
    """The notebook with new outputs. Raises what a cell raises."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    count = 0
    for cell in book["cells"]:
        if cell["cell_type"] == "code":
            count += 1
            cell["outputs"] = _outputs("".join(cell["source"]), namespace, count)
            cell["execution_count"] = count
    return book


def _outputs(source: str, namespace: dict[str, Any], count: int) -> list[dict[str, Any]]:
    tree = ast.parse(source, f"<cell {count}>")
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, f"<cell {count}>", "exec"), namespace)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), f"<cell {count}>", "eval"), namespace)
    found: list[dict[str, Any]] = []
    if printed.getvalue():
        found.append({"output_type": "stream", "name": "stdout", "text": printed.getvalue().splitlines(keepends=True)})
    if value is not None:
        data = {"text/plain": repr(value)[:500].splitlines(keepends=True)}
        if hasattr(value, "_repr_html_"):
            data["text/html"] = value._repr_html_().splitlines(keepends=True)
        found.append({"output_type": "execute_result", "execution_count": count, "metadata": {}, "data": data})
    return found


if __name__ == "__main__":
    file = Path(sys.argv[1])
    file.write_text(json.dumps(run(cells(file)), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
