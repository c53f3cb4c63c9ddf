"""Without a GPU, Triton can still compile for one: the interpreter accepts code that the compiler refuses.

Compiles the fused kernels at Llama 3 8B shapes for Hopper and looks at their memory accesses in PTX.
"""

from __future__ import annotations

import os
import subprocess
import sys

SCRIPT = r"""
import re
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fa_research.kernels import activation, fill_metadata, norm, rope_kv

# A stride that Triton sees is a multiple of 16 is "stride"; one that it may not assume anything of is "any".
POINTERS = {"bf16": "*bf16", "f32": "*fp32", "i32": "*i32", "i64": "*i64"}
KINDS = {**POINTERS, "any": "i32", "stride": "i32", "float": "fp32"}

def accesses(kernel, constants, warps=4, **kinds):
    signature, attrs = {}, {}
    for i, name in enumerate(kernel.arg_names):
        kind = "constexpr" if name in constants else kinds.get(name)
        if kind is None:
            kind = "stride" if "_stride_" in name else "bf16" if name.endswith("_ptr") else "any"
        signature[name] = KINDS.get(kind, kind)
        if kind not in ("constexpr", "any", "float"):
            attrs[(i,)] = [["tt.divisibility", 16]]
    constexprs = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attrs)
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps}).asm["ptx"]
    return set(re.findall(r"(?:ld|st)\.global[.\w]*", ptx))

wide = {"ld.global.v4.b32", "st.global.v4.b32"}
block, rows, warps = norm.launch_config(4096)
shape = {"WIDTH": 4096, "BLOCK": block, "ROWS": rows}
assert accesses(norm._rms_norm_kernel, {"heads": 1, **shape}, warps, eps="float") == wide
assert accesses(norm._add_rms_norm_kernel, shape, warps, eps="float") == wide
block, rows, warps = norm.launch_config(128)
shape = {"WIDTH": 128, "BLOCK": block, "ROWS": rows}
assert wide < accesses(norm._rms_norm_kernel, shape, warps, eps="float")
for tokens in (1, 4096):
    block, warps = activation.launch_config(tokens, 14336)
    for name in ("silu", "gelu_tanh", "swiglu_clamped"):
        shape = {"F": 14336, "BLOCK": block, "PARTS": 14336 // block, "ACTIVATION": name}
        assert accesses(activation._glu_kernel, shape, warps) == wide
assert accesses(activation._softcap_kernel, {"BLOCK": activation.SOFTCAP_BLOCK}, cap="float", count="stride") == wide
heads = {"H": 32, "K": 8, "HALF": 64, "BLOCK_HALF": 64, "V": 128, "BLOCK_V": 128}
heads["Q_HEADS"], heads["KV_HEADS"], warps = rope_kv.launch_config(32, 8, 128, 128)
index = {"positions_ptr": "i64", "loc_ptr": "i64"}
assert wide < accesses(rope_kv._rope_write_kv_kernel, heads, warps, cos_sin_ptr="f32", **index)
kv = {"K": 8, "D": 128, "BLOCK_D": 128, "V": 128, "BLOCK_V": 128, "KV_HEADS": heads["KV_HEADS"]}
assert wide < accesses(rope_kv._write_kv_kernel, kv, warps, **index)
for page_size in (1, 3, 16):
    for more in ({}, {"extend_seq_lens_ptr": None}):
        kernel, shape = fill_metadata._fill_metadata_kernel, {"PAGE_SIZE": page_size, "BLOCK_B": 64, "BLOCK_P": 1024}
        accesses(kernel, {**shape, **more}, **{name: "i32" for name in kernel.arg_names if name.endswith("_ptr")})
kernel = fill_metadata._advance_decode_kernel
ints = {name: "i32" for name in kernel.arg_names if name.endswith("_ptr")}
accesses(kernel, {"BLOCK_B": 128}, **{**ints, "positions_ptr": "i64", "out_cache_loc_ptr": "i64"})
print("compiled")
"""


def test_fused_kernels_compile_for_hopper_with_16_byte_accesses() -> None:
    env = {**os.environ, "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "compiled"


def test_cpu_tensors_never_reach_triton() -> None:
    """The interpreter is for tests of the kernels; a model on the CPU must run torch."""
    script = (
        "import sys, torch\n"
        "from fa_research.kernels import ops\n"
        "x = torch.randn(2, 64)\n"
        "ops.add_rms_norm(ops.glu(x, 'silu'), torch.zeros(2, 32), torch.ones(32), 1e-5)\n"
        "assert not {f'fa_research.kernels.{m}' for m in ('norm', 'activation')} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
