"""Prints the breaches of every structural rule."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.support.structure import RULES
from tests.support.structure.tree import Tree


def main(root: Path) -> int:
    """Check the tree at root; 1 if a rule is broken."""
    tree = Tree(root)
    count = 0
    for name, rule in RULES.items():
        for breach in rule(tree):
            count += 1
            print(f"{breach} [{name}]")
    print(f"structure: {len(RULES)} rules, {len(tree.sources)} files, {count} breaches")
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else ".").resolve()))
