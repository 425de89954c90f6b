"""The project's files as the structural rules see them: paths, text, syntax trees, module names."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

PACKAGE = "bitnet_mlx"
KERNELS = "metal_kernels"
CODE_FOLDERS = (PACKAGE, KERNELS, "scripts", "tests", "benchmarks", ".ci")
_SHELL = (b"#!/bin/sh", b"#!/usr/bin/env sh", b"#!/usr/bin/env bash", b"#!/bin/bash")


class Breach(NamedTuple):
    """One place that breaks one rule."""

    path: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.text}"


class Source(NamedTuple):
    """A file of code. language: "python", "c" (Metal and C headers) or "shell"."""

    path: str
    language: str
    text: str


class Module(NamedTuple):
    """A module of the package and its syntax tree."""

    name: str
    path: str
    tree: ast.Module
    is_package: bool


class Tree:
    """Everything under one root, read once. root: the folder that holds pyproject.toml."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @cached_property
    def sources(self) -> list[Source]:
        """Every code file of the project's own folders, in path order."""
        return sorted(source for folder in CODE_FOLDERS for source in self._read(self.root / folder))

    def _read(self, folder: Path) -> Iterator[Source]:
        for path in folder.rglob("*"):
            if not path.is_file() or "__pycache__" in path.parts:
                continue
            language = _language(path)
            if language:
                yield Source(path.relative_to(self.root).as_posix(), language, path.read_text(encoding="utf-8"))

    @cached_property
    def python(self) -> list[tuple[Source, ast.Module]]:
        """Python files with their syntax trees."""
        return [(s, ast.parse(s.text, s.path)) for s in self.sources if s.language == "python"]

    @cached_property
    def modules(self) -> dict[str, Module]:
        """Modules of the package by full name; metal_kernels counts as bitnet_mlx.metal_kernels."""
        found = {}
        for source, tree in self.python:
            parts = Path(source.path).with_suffix("").parts
            if parts[0] not in (PACKAGE, KERNELS):
                continue
            if parts[0] == KERNELS:
                parts = (PACKAGE, *parts)
            is_package = parts[-1] == "__init__"
            name = ".".join(parts[:-1] if is_package else parts)
            found[name] = Module(name, source.path, tree, is_package)
        return found


def literals(tree: ast.Module) -> dict[str, Any]:
    """Module-level names set to literals."""
    values = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            try:
                values[node.targets[0].id] = ast.literal_eval(node.value)
            except ValueError:
                continue
    return values


def _language(path: Path) -> str:
    by_suffix = {".py": "python", ".metal": "c", ".h": "c", ".sh": "shell"}
    if path.suffix in by_suffix:
        return by_suffix[path.suffix]
    if path.suffix:
        return ""
    with path.open("rb") as file:
        first = file.readline(200)
    if first.startswith(b"#!") and b"python" in first:
        return "python"
    return "shell" if first.rstrip().startswith(_SHELL) else ""
