"""The peak resident memory of this process."""

from __future__ import annotations

import sys
from pathlib import Path


def peak_rss_mb() -> float:
    """Return the process's peak resident memory so far, in MiB (0.0 if the system does not report it)."""
    try:
        # Not getrusage on Linux: its maximum starts from the parent's size at the fork.
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    if sys.platform == "win32":
        return 0.0
    import resource  # POSIX only

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 1024
