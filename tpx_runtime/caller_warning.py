"""Warnings that point to the application's line, however deep in the runtime they are raised."""

import sys
import warnings
from pathlib import Path

_PACKAGE = str(Path(__file__).parent)


def warn_caller(message: str, category: type[Warning]) -> None:
    """Warn at the innermost line outside of this package, to which Python's filters for repeated warnings then apply."""
    level, frame = 1, sys._getframe()  # warnings.warn has skip_file_prefixes only since Python 3.12
    while frame.f_back and frame.f_code.co_filename.startswith(_PACKAGE):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
