"""vcompress: compress a trained video model and prove what it can still do."""

from __future__ import annotations

__version__ = "0.1.0"
