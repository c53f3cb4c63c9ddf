"""Without a GPU, Triton can still compile for one: the interpreter accepts code that the compiler refuses.

Compiles the attention kernels for Hopper in every shape of code they have, and looks for what their speed rests
on: asynchronous copies of 16 bytes, warpgroup matrix products, nothing spilled from registers.
"""

from __future__ import annotations

import os
import subprocess
import sys

SCRIPT = r"""
import pathlib, re, subprocess, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fa_research.kernels import common, paged_decode, paged_extend

TYPES = {"table_ptr": "*i32", "seqlens_ptr": "*i32", "starts_ptr": "*i32", "scale": "fp32", "softcap": "fp32"}
COMMON = {"KV_HEADS": 8, "GROUP": 4, "HEAD_DIM": 128, "PAGE_SIZE": 16, "STRIDE_KN": 1024, "STRIDE_VN": 1024,
          "WINDOW": 0, "CHUNK": 0, "HAS_SOFTCAP": False, "BLOCK_B": 64, "sinks_ptr": None, "lse_ptr": None}
DECODE = {"BLOCK_H": 16, "MAX_SPLITS": 0, "MIN_TILES": 2, "OVERLAP": True, "BLOCK_S": 16}
FEATURES = {"WINDOW": 128, "CHUNK": 96, "HAS_SOFTCAP": True, "PAGE_SIZE": 48, "GROUP": 7}

def compiled(kernel, constants, dtype, warps, stages):
    names = kernel.arg_names
    constants = {name: value for name, value in constants.items() if name in names}
    pools = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), "*" + dtype)
    kinds = {name: (pools | TYPES).get(name, "*fp32" if name.endswith("_ptr") else "i32") for name in names}
    signature = kinds | dict.fromkeys(constants, "constexpr")
    even = [name for name in names if signature[name][0] == "*" or name.startswith("stride")]
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in even}
    constexprs = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attrs)
    options = {"num_warps": warps, "num_stages": stages}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)

def copies(program):
    return set(re.findall(r"cp\.async\.c\w\.shared\.global.*?, (0x\w+)[,;]", program.asm["ptx"].replace("\n", " ")))

def stack_bytes(program):
    tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(program.asm["cubin"])
        file.flush()
        done = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    return int(re.search(r"STACK:(\d+)", done.stdout + done.stderr).group(1))

def decode(dtype="bf16", itemsize=2, **changes):
    shape = COMMON | DECODE | changes
    config = paged_decode.decode_config(shape["HEAD_DIM"], shape["GROUP"], itemsize, shape["PAGE_SIZE"])
    shape |= {"BLOCK_N": config.block_n, "BLOCK_D": common.block_dim(shape["HEAD_DIM"])}
    compiled(paged_decode._combine_kernel, shape, dtype, 4, 3)
    return compiled(paged_decode._decode_kernel, shape, dtype, config.num_warps, config.num_stages)

def extend(dtype="bf16", itemsize=2, **changes):
    shape = COMMON | {"CAUSAL": True} | changes
    config = paged_extend.extend_config(shape["HEAD_DIM"], shape["GROUP"], itemsize, shape["PAGE_SIZE"])
    shape |= {"BLOCK_N": config.block_n, "BLOCK_M": config.block_m}
    shape |= {"BLOCK_D": common.block_dim(shape["HEAD_DIM"])}
    return compiled(paged_extend._extend_kernel, shape, dtype, config.num_warps, config.num_stages)

for page_size, head_dim in ((16, 128), (128, 128), (16, 96)):
    shape = {"PAGE_SIZE": page_size, "HEAD_DIM": head_dim, "STRIDE_KN": 8 * head_dim, "STRIDE_VN": 8 * head_dim}
    program = decode(**shape)
    assert copies(program) == {"0x10"} and stack_bytes(program) == 0
    program = extend(**shape)
    assert copies(program) == {"0x10"} and stack_bytes(program) == 0
    assert "wgmma.mma_async" in program.asm["ptx"]
some = {"sinks_ptr", "lse_ptr"}
COMMON = {name: value for name, value in COMMON.items() if name not in some}
for dtype, itemsize, more in (("bf16", 2, FEATURES), ("fp32", 4, {"HEAD_DIM": 64})):
    decode(dtype, itemsize, **more)
    decode(dtype, itemsize, MAX_SPLITS=32, MIN_TILES=8, OVERLAP=False, **more)
    extend(dtype, itemsize, **more)
extend("fp16", CAUSAL=False, PAGE_SIZE=1)
print("compiled")
"""


def test_attention_kernels_compile_for_hopper() -> None:
    env = {**os.environ, "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and done.stdout.strip() == "compiled", done.stderr[-3000:]
