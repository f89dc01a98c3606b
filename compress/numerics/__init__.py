"""Number formats as arithmetic, one file a format; importing it registers the operators.

Every format has `quantize_weight`, `dequantize` (of a stored weight), `fake_quantize_weight`,
`weight_bits` (of a shape) and, unless it is for weights only, `quantize_dequantize` (of an input);
`input_scale` where that takes a calibrated scale. `dequantize` and `quantize_dequantize` are
`torch.library` operators in the namespace `vcompress`: they run on any device, pass through
`torch.export`, and a dialect of `vcompress.export` translates those of its target. `hadamard` is no
format; it rotates what a format rounds.

| format | element | scale of a weight | scale of an input | weight bits a value |
|---|---|---|---|---|
| nvfp4 | E2M1 | E4M3 per 16, FP32 per tensor | E4M3 per 16 dynamic, FP32 static | 4.5 |
| mxfp4 | E2M1 | E8M0 per 32 | E8M0 per 32, dynamic | 4.25 |
| int4 | INT4 | FP16 per 32, 64 or 128 | none, weights only | 4.5, 4.25 or 4.125 |
| mxfp8 | E4M3 | E8M0 per 32 | E8M0 per 32, dynamic | 8.25 |
| fp8 | E4M3 | FP32 per tensor or channel | FP32 per tensor, static, or per token, dynamic | 8 + |
| int8 | INT8 | FP32 per channel | FP32 per tensor, static, or per token, dynamic | 8 + |
"""

from __future__ import annotations

from vcompress.compress.numerics import fp8, hadamard, int4, int8, mxfp4, mxfp8, nvfp4

__all__ = ["fp8", "hadamard", "int4", "int8", "mxfp4", "mxfp8", "nvfp4"]
