"""The cache policies: one file each, pure functions of explicit state."""
