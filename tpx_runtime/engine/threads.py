"""How many threads engines on the CPU may take."""

import os

from ..errors import BadInput, shorten

THREADS_VARIABLE = "TPX_THREADS"


def threads_wanted() -> int | None:
    """What TPX_THREADS says; None where that is nothing, and engines take every core. Raises BadInput."""
    said = os.environ.get(THREADS_VARIABLE, "").strip()
    if not said:
        return None
    if not said.isascii() or not said.isdigit() or int(said) < 1:
        raise BadInput(
            f"expected {THREADS_VARIABLE} to be a whole number of at least 1, found {shorten(said)}"
        )
    return int(said)
