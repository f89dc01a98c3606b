"""Number formats as arithmetic, one file a format; importing it registers the operators.

Every format has `quantize_weight`, `fake_quantize_weight`, `input_scale`, `quantize_dequantize` (of
an input) and `dequantize` (of a stored weight). The last two are `torch.library` operators in the
namespace `vcompress`: they run on any device, pass through `torch.export`, and a dialect of
`vcompress.export` translates them.
"""

from __future__ import annotations

from vcompress.compress.numerics import fp8, int8, nvfp4

__all__ = ["fp8", "int8", "nvfp4"]
