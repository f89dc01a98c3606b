"""Compression passes: each decides a section of the plan, then applies it mechanically."""
