"""Bounds of histograms."""

from __future__ import annotations

MANTISSAS = ("1", "1.35", "1.8", "2.5", "3.5", "5", "6.5", "8")


def eight_a_decade(first: int, last: int) -> tuple[float, ...]:
    """From 10 to the `first` up to 10 to the `last`; those of 1, 2.5 and 5, which people ask for, are among them."""
    # Read, not multiplied: labels are to show what is written here.
    return (*(float(f"{digits}e{decade}") for decade in range(first, last) for digits in MANTISSAS), 10.0**last)
