"""Answers of KernelOps' questions: measured once on a chip and remembered, or, for tests and tools, simply the best guess."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from bitnet_mlx.backends.kernels import products
from bitnet_mlx.backends.kernels.choices import Choice, Choices
from bitnet_mlx.backends.kernels.problem import Product
from bitnet_mlx.backends.kernels.products import ROWS, Candidate
from bitnet_mlx.backends.kernels.row_kernels import RowKernel
from bitnet_mlx.backends.kernels.source import Platform
from bitnet_mlx.backends.kernels.tune import BUCKETS, Tuner, bucket, instead, optional
from bitnet_mlx.errors import KernelWarning

_log = logging.getLogger(__name__)


class Chooser(Protocol):
    """What KernelOps asks."""

    def product(self, product: Product) -> Candidate | None:
        """The kernel for a product; None: stock MLX."""
        ...

    def allows(self, kernel: RowKernel) -> bool:
        """Whether a kernel that works row by row may be used."""
        ...


class BestGuess:
    """The first variant of everything, unchecked."""

    def __init__(self, platform: Platform) -> None:
        self.platform: Platform = platform

    def product(self, product: Product) -> Candidate | None:
        options = products.candidates(self.platform, product.n, product.k, product.m)
        return options[0] if options else None

    def allows(self, kernel: RowKernel) -> bool:
        return True


class Measured:
    """Each kernel is checked and timed at its first use on a chip; what was found is kept in a file.

    A kernel that is wrong, fails, or is slower than stock MLX is off, with one warning when that is found out.
    """

    def __init__(self, platform: Platform, tuner: Tuner, choices: Choices) -> None:
        self.platform: Platform = platform
        self.tuner, self.choices = tuner, choices
        self._products: dict[Product, Candidate | None] = {}
        self._rows: dict[str, bool] = {}
        self._told = False

    def question(self, product: Product) -> str:
        """Under which a product's choice is kept."""
        return str(asked(product))

    def product(self, product: Product) -> Candidate | None:
        at = asked(product)
        if at not in self._products:
            self._products[at] = self._settled(at)
        return self._products[at]

    def allows(self, kernel: RowKernel) -> bool:
        if kernel.question not in self._rows:
            choice = self.choices.get(kernel.question) or self._found(
                kernel.question, lambda: self.tuner.row_kernel(kernel)
            )
            self._rows[kernel.question] = choice.label is not None
        return self._rows[kernel.question]

    def _settled(self, product: Product) -> Candidate | None:
        question = str(product)
        known = self.choices.get(question)
        if known is not None:
            if known.label is None:
                return None
            candidate = self._named(product, known.label)
            if candidate is not None:
                return candidate
        if product.m in BUCKETS:
            found = self._found(question, lambda: self.tuner.product(product))
        else:  # a kernel of its own for this m, of the variant that won for the measured m above
            best = self.product(replace(product, m=bucket(product.m)))
            if best is None:
                return None
            found = self._found(question, lambda: self.tuner.checked(product, best))
        return None if found.label is None else self._named(product, found.label)

    def _named(self, product: Product, label: str) -> Candidate | None:
        return products.find(self.platform, product.n, product.k, bucket(product.m), label)

    def _found(self, question: str, measure: Callable[[], Choice]) -> Choice:
        if not self._told:
            self._told = True
            _log.info("[kernels] checking and timing kernels on this chip: once for each shape, some seconds")
        choice = measure()
        self.choices.put(question, choice)
        if choice.label is None and (choice.fault or not optional(question)):
            warn_off(question, choice)
        elif choice.fault:
            _log.warning("[kernels] %s: %s", question, choice.reason)
        _log.debug("[kernels] %s: %s", question, choice)
        return choice


def asked(product: Product) -> Product:
    """Few rows are asked about one by one, many by the measured number that stands for them."""
    return product if product.m <= ROWS else replace(product, m=bucket(product.m))


def warn_off(question: str, choice: Choice) -> None:
    """Say that a kernel is off."""
    warnings.warn(
        f"[kernels] our kernel for {question} is switched off on this machine: {choice.reason}; "
        f"{instead(question)}, of the same numbers, takes its place; `bitnet-mlx doctor` shows all kernels",
        KernelWarning,
        stacklevel=2,
    )
