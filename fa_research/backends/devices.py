"""Which NVIDIA GPUs kernels run on: reasons why this one cannot, as `AttentionBackend.unavailable` gives them."""

from __future__ import annotations

import torch


def reasons_against_ampere(device: torch.device) -> tuple[str, ...]:
    """Kernels for compute capability 8.0 and newer."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return ("needs an NVIDIA GPU of compute capability 8.0 or newer; there is no CUDA device here",)
    major, minor = torch.cuda.get_device_capability(device)
    return () if major >= 8 else (f"needs compute capability 8.0 or newer, this GPU has {major}.{minor}",)


def reasons_against_hopper(device: torch.device) -> tuple[str, ...]:
    """Kernels for compute capability 9.x and no other."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return ("needs an NVIDIA Hopper GPU (compute capability 9.x); there is no CUDA device here",)
    major, minor = torch.cuda.get_device_capability(device)
    return () if major == 9 else (f"needs compute capability 9.x (Hopper), this GPU has {major}.{minor}",)
