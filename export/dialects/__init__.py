"""ONNX dialects, one file each: what a runtime accepts, and how operators are written for it."""
