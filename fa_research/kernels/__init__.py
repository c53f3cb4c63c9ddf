"""Our own Triton kernels, one file each: they know tensors and nothing of the engine.

Without a CUDA (or ROCm) device they run in Triton's interpreter on CPU tensors, in float32 and float16. Triton reads
TRITON_INTERPRET when a kernel is decorated, so it is set here, before any kernel file of this package is imported.
"""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
