"""`python -m bitnet_mlx` is `bitnet-mlx`."""

import sys

from bitnet_mlx.cli.main import main

sys.exit(main())
