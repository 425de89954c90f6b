"""The clock of a compiled step's marks: the C library's monotonic one, which compiled code and Python both read."""

from __future__ import annotations

import sys
import time

available = sys.platform != "win32"
# macOS's other monotonic clock counts microseconds.
CLOCK = 0 if sys.platform == "win32" else time.CLOCK_UPTIME_RAW if sys.platform == "darwin" else time.CLOCK_MONOTONIC


def now() -> int:
    """Nanoseconds. Not on Windows (see `available`)."""
    return time.clock_gettime_ns(CLOCK)
