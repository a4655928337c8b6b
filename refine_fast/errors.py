"""Exceptions for user errors. Each message names the problem and how to fix it."""

from __future__ import annotations

import warnings
from functools import cache


class RefineFastError(Exception):
    """Bad input or an unusable environment.

    The message names the file, the field, the value and the remedy. The command line prints it
    without a traceback and exits with 2.
    """


class RefineFastWarning(UserWarning):
    """Something was skipped or looks wrong; the work continued."""


@cache
def warn_once(message: str) -> None:
    """Issues a RefineFastWarning with this message, the first time in this process only."""
    warnings.warn(message, RefineFastWarning, stacklevel=4)
