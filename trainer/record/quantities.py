"""Quantities as a person reads them, on the terminal and in the report."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """9s, 3m05s, 2h07m, 3d04h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02}h"


def percent(fraction: float | None) -> str:
    """41.2%; n/a for None."""
    return "n/a" if fraction is None else f"{fraction:.1%}"


def gigabytes(byte_count: float) -> str:
    """1.12 GB, of 10⁹ bytes."""
    return f"{byte_count / 1e9:.2f} GB"


def short(number: float) -> str:
    """999, 12.3 k, 4.20 M, 1.50 B, 2.00 T: about three digits and the power of a thousand."""
    value, power = number, ""
    for power_above in ("k", "M", "B", "T"):
        # What would be printed as 1000 belongs to the next power.
        if abs(value) < 999.5:
            break
        value, power = value / 1000, power_above
    if not power:
        return f"{value:.0f}"
    return f"{value:.{2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0}f} {power}"


def decimal(value: float) -> str:
    """0.83, but 4.1e-05 where two decimals would show next to nothing."""
    return f"{value:.1e}" if 0 < abs(value) < 0.005 else f"{value:.2f}"
