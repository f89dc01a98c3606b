"""Calibration data: videos and arrays become model inputs, and layers are watched on them."""
