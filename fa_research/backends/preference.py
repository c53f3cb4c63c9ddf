"""The order in which `backend=auto` tries backends: measured, and kept with the study that measured it."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Preference:
    """Backends, the preferred one first, and the reason for this order. What is not named is never chosen."""

    order: tuple[str, ...]
    reason: str


# Geometric means of attention_us over the fastest backend of each cell, decode: triton 1.01, fa3 1.03, flashinfer 1.03
# (without its planning on the host), fa2 1.17, fa4 2.1. In extend passes triton takes 1.7 times as long as fa3
# (experiments/attention_kernels), so fa3 comes first.
_H200 = Preference(
    ("fa3", "triton", "flashinfer", "fa2", "fa4", "torch"),
    "in the order measured on an NVIDIA H200 (experiments/backend_vs_context, experiments/attention_kernels)",
)
BY_GPU = {"NVIDIA H200": _H200}
_CPU = Preference(("torch",), "on this device the others are for tests only")


def preference(device: torch.device) -> Preference:
    """The order for this device; a GPU that was not measured has the H200's."""
    if device.type != "cuda":
        return _CPU
    name = torch.cuda.get_device_name(device) if torch.cuda.is_available() else ""
    return BY_GPU.get(name, _H200)
