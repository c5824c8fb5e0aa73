"""What a provider's script reports: a line of JSON for each step and one at the end.

It needs nothing but the standard library, and so runs in any environment: Python finds it beside the script.
"""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path


class StepLog:
    """Times the steps of one process: call `step` with the loss after each, and `end` once."""

    def __init__(self) -> None:
        self.last = time.perf_counter() - _age()

    def step(self, loss: float) -> None:
        """Print the seconds since the last step ended (of the first: since the process began) and the loss."""
        now = time.perf_counter()
        print(json.dumps({"seconds": now - self.last, "loss": loss}), flush=True)
        self.last = time.perf_counter()

    def end(self) -> None:
        """Print the most resident memory that the process has had, in bytes (Linux's VmHWM)."""
        status = Path("/proc/self/status").read_text()
        match = re.search(r"VmHWM:\s+(\d+) kB", status)
        print(json.dumps({"peak_rss_bytes": int(match.group(1)) * 1024 if match else None}), flush=True)


def _age() -> float:
    """Seconds since this process began."""
    ticks = float(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    return uptime - ticks / os.sysconf("SC_CLK_TCK")
