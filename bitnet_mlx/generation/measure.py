"""Peak memory of this process, as its operating system counts it."""

from __future__ import annotations

import sys
from pathlib import Path


def peak_memory_bytes() -> int | None:
    """The largest resident set so far, mapped pages included, in bytes; None where the system does not tell.

    On Linux VmHWM, because getrusage's figure there starts from the parent process's. macOS counts ru_maxrss in bytes.
    """
    if sys.platform.startswith("linux"):
        try:
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        except OSError:
            pass  # no /proc here: the next best figure follows
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
