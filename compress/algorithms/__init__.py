"""Calibration algorithms for one linear layer at a time: which numbers its frozen form holds.

A `LayerProblem` goes in, a weight with the inputs that calibration saw; a `Solution` comes out, the
tensors of `compress.tensors` and the size of an online rotation. `select.solve` is the door; the
algorithms are one file each and are composed in `recipes`.
"""
