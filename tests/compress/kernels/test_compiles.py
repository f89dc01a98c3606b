"""Triton compiles the kernels for Hopper, which needs no GPU, and they use its tensor cores."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import triton.language as tl
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vcompress.compress.kernels import triton_attention, triton_matmul

def instructions(kernel, types, constants):
    names = kernel.arg_names
    places = {name: (names.index(name),) for name in names}
    source = ASTSource(
        kernel, {name: types.get(name, "constexpr") for name in names},
        {places[name]: value for name, value in constants.items()},
        # What torch allocates is aligned, and so are the sizes of models.
        {places[name]: [["tt.divisibility", 16]] for name, type in types.items()
         if type.startswith("*") or name in ("N", "K", "num_groups")},
    )
    return compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8}).asm["ptx"]

floats = ("unit_pointer", "row_pointer", "column_pointer", "bias_pointer")
sizes = ("M", "N", "K", "num_groups", "row_stride", "column_stride")
common = {**dict.fromkeys(floats, "*fp32"), **dict.fromkeys(sizes, "i32"), "out_pointer": "*bf16",
          "w_pointer": "*u8", "scale_pointer": "*u8"}
for like, type, product in (
    (tl.bfloat16, "*bf16", "f32.bf16.bf16"), (tl.int8, "*i8", "s32.s8.s8"),
    (tl.float8e4nv, "*fp8e4nv", "f32.e4m3.e4m3"),
):
    text = instructions(
        triton_matmul.matmul, {"a_pointer": type, **common},
        dict(WEIGHT="nvfp4", GROUP=16, HALF=64, LIKE=like, HAS_UNIT=like != tl.bfloat16,
             HAS_BIAS=True, INTERPRETED=False, BLOCK_M=128, BLOCK_N=128),
    )
    assert "wgmma" in text and product in text, product
order = triton_attention.attention.arg_names
codes = {"query_pointer": "*i8", "key_pointer": "*i8", "value_pointer": "*fp8e4nv"}
types = {**codes, "out_pointer": "*bf16", "factor": "fp32",
         **{f"{name}_scale_pointer": "*fp32" for name in ("query", "key", "value")},
         **dict.fromkeys(("L", "S", "D", "F"), "i32")}
text = instructions(
    triton_attention.attention, {name: types[name] for name in order if name in types},
    dict(FLOAT=True, CAUSAL=False, INTERPRETED=False, BLOCK_L=128, BLOCK_S=64, BLOCK_D=64,
         BLOCK_F=64),
)
assert "s32.s8.s8" in text and "f32.e4m3.e4m3" in text
print("compiled")
"""


def test_the_kernels_compile_for_hopper(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    program = tmp_path / "program.py"
    program.write_text(PROGRAM, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(program)], capture_output=True, text=True, check=False,
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path / "cache")},
    )  # fmt: skip
    assert done.stdout.strip() == "compiled", done.stderr[-2000:]
