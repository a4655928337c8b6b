"""What the user did can be wrong in one place only: here are the exceptions that say so. Each message is one sentence with its remedy."""

from __future__ import annotations


class RefineFastError(Exception):
    """Bad input or an unusable environment; the message names the file, the field, the value and the remedy. The command line prints it
    without a traceback and exits with 2."""


class RefineFastWarning(UserWarning):
    """Something was skipped or looks wrong, and the work went on."""
