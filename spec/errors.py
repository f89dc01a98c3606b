"""Errors that a user can act on, each with the exit code that the command line ends with.

A message states the constraint, the value that broke it and the remedy. Anything that is not a
`VcompressError` is a bug in vcompress and ends with exit code 1.
"""

from __future__ import annotations

__all__ = [
    "BuildError",
    "InconclusiveError",
    "InputError",
    "MissingCapabilityError",
    "QualityGateError",
    "VcompressError",
]


class VcompressError(Exception):
    """Base class of all errors that vcompress raises on purpose."""

    exit_code = 1


class InputError(VcompressError, ValueError):
    """The model, the clips, the plan or a flag is wrong (exit code 2)."""

    exit_code = 2


class QualityGateError(VcompressError):
    """The result misses the quality bar (exit code 3)."""

    exit_code = 3


class InconclusiveError(VcompressError):
    """The measurement is too noisy for a verdict: neither passed nor failed (exit code 4)."""

    exit_code = 4


class MissingCapabilityError(VcompressError):
    """This machine cannot do it: a package, a device or a codec is missing (exit code 5)."""

    exit_code = 5


class BuildError(VcompressError):
    """Export, engine build or read-back failed although the inputs were fine (exit code 6)."""

    exit_code = 6
