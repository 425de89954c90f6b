"""`python -m tests.gpu FAMILY`: check one family of kernels on this machine's GPU; prints one JSON record."""

from __future__ import annotations

import json
import sys

from bitnet_mlx.backends.mlx_import import mx
from tests.gpu.families import check

if __name__ == "__main__":
    print(json.dumps(check(sys.argv[1], "metal" if mx.metal.is_available() else "cuda")))
