"""Defaults that the command line, the Python interface and the documentation share."""

from __future__ import annotations

__all__ = [
    "ALGORITHM", "ATTENTION", "MAX_DROP_POINTS", "MAX_LAYER_ERROR", "MIN_AGREEMENT", "NUM_CHECKS",
    "NUM_CLIPS", "NUM_TEST_CLIPS",
]  # fmt: skip

# How 4-bit layers are calibrated; see docs/precision.md for what it is compared with.
ALGORITHM = "auto"

# The products of attention are left alone unless they are asked for.
ATTENTION = "keep"

NUM_CLIPS = 64
NUM_TEST_CLIPS = 1000

# Relative error of a block's output that one layer alone may cause before it gets more bits.
MAX_LAYER_ERROR = 0.02

# The bar where clips have labels and the user names none.
MAX_DROP_POINTS = 1.0

# Of streams: windows answered as by computing, and windows computed both ways.
MIN_AGREEMENT = 0.99
NUM_CHECKS = 3
