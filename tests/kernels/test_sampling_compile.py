"""Without a GPU, Triton can still compile for one: the interpreter accepts code that the compiler refuses.

Compiles the sampling kernels at Gemma 3's vocabulary for Hopper: 16 bytes a load, and nothing spilt to memory.
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
from fa_research.kernels import sampling, sampling_draw, sampling_threshold

DTYPES = {
    "temperature_ptr": "*fp32", "top_k_ptr": "*i32", "seed_ptr": "*i64", "positions_ptr": "*i32",
    "part_keys_ptr": "*i32", "part_ids_ptr": "*i32", "leaders_ptr": "*i32",
    "out_ptr": "*i64",
}

def compiled(kernel, constants, warps, logits):
    signature, attrs = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        pointer = name.endswith("_ptr")
        signature[name] = DTYPES.get(name, "*fp32") if pointer else "i32"
        if name == "logits_ptr":
            signature[name] = logits
        if pointer or name in ("vocab", "logits_stride_b"):
            attrs[(i,)] = [["tt.divisibility", 16]]
    constexprs = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attrs)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps}).asm

greedy = dict.fromkeys(["temperature_ptr", "seed_ptr", "positions_ptr", "peak_ptr", "threshold_ptr"])
for logits, width, shift in (("*bf16", 8, 16), ("*fp32", 4, 0)):
    for kernel, constants, warps in (
        (sampling._summary_kernel, {"GROUP": 32}, 8),
        (sampling_draw.draw_kernel, {"LANES": sampling_draw.LANES}, 8),
        (sampling_draw.draw_kernel, {"LANES": sampling_draw.LANES, **greedy}, 8),
        (sampling_threshold.threshold_kernel,
         {"GROUP": 32, "GROUPS": 8192, "SPLITS": 64, "SHIFT": shift, "CAPACITY": sampling_threshold.CAPACITY,
          "LANES": 512, "WIDTH": width}, 16),
    ):
        asm = compiled(kernel, constants, warps, logits)
        assert re.search(r"ld\.global[.\w]*v4\.b32", asm["ptx"]), (kernel, logits)
        assert not re.search(r"(?:ld|st)\.local", asm["ptx"]), (kernel, logits)
        assert not re.search(r"\b(?:LDL|STL)\b", asm["sass"]), (kernel, logits)
compiled(sampling_draw.combine_kernel, {"SPLITS": 16}, 1, "*bf16")
print("compiled")
"""


def test_sampling_kernels_compile_for_hopper() -> None:
    env = {**os.environ, "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "compiled"
