"""The plan executed: weights stay packed, and products run on what a GPU multiplies.

`execute` swaps the layers of a planned module; `layout` is how packed weights lie in memory,
`operators` what torch sees, `triton_...` the kernels, which need the package triton and are
imported when a tensor is on a GPU, or when Triton's interpreter is asked for.
"""
