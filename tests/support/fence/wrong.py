"""Results that were wrong while something failed. What fails for want of time may be tried again; this may not."""

FOUND: list[str] = []
"""What was found in this process; `conftest.py` reads it."""
EXIT_CODE = 8
"""Of a run that found any; 1 is pytest's for any other failure."""


def wrong(what: str) -> str:
    """Tell of a result that is not what it should be, and hand the words back."""
    FOUND.append(what)
    return what
