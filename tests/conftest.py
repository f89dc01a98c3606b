"""Keeps one copy of the package in memory while pytest collects."""

from __future__ import annotations

import sys
from pathlib import Path

import vcompress

# The checkout root holds the package's `__init__.py`, so pytest imports it a second time, under
# the name of the checkout's folder. Under that name it must find the module that is there already.
sys.modules.setdefault(Path(__file__).resolve().parents[1].name, vcompress)
