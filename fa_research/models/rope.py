"""Rotary position embedding as a table: cosines and sines of every position, made once per model.

Legend: X positions, D head dim.
Idea: Su et al., "RoFormer" (2021); the scaling that stretches Llama 3.1 to long contexts is Meta's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fa_research.config import RopeScaling, RopeType


def inverse_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling, device: torch.device | str | None = None
) -> Tensor:
    """Radians per position of each pair of dimensions, float64 [D / 2].

    Llama 3 scaling divides the slow frequencies by ``factor``, leaves the fast ones, and blends between: a pair is
    slow if it turns less than ``low_freq_factor`` times within ``original_max_position``, fast if it turns more than
    ``high_freq_factor`` times.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim
    frequencies = theta**-exponents
    if scaling.type is RopeType.none:
        return frequencies
    assert scaling.type is RopeType.llama3, scaling.type
    turns = scaling.original_max_position * frequencies / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def build_cos_sin(
    num_positions: int,
    head_dim: int,
    theta: float,
    scaling: RopeScaling,
    device: torch.device | str | None = None,
) -> Tensor:
    """float32 [X, D] = cos(D / 2) | sin(D / 2). The angles are computed in float64: at position 100,000 a float32
    angle is off by some thousandths of a radian already."""
    positions = torch.arange(num_positions, dtype=torch.float64, device=device)
    angles = torch.outer(positions, inverse_frequencies(head_dim, theta, scaling, device))
    table = torch.empty(num_positions, head_dim, dtype=torch.float32, device=device)
    cos, sin = table.chunk(2, dim=1)
    cos.copy_(angles.cos())
    sin.copy_(angles.sin())
    return table
