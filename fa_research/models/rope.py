"""Rotary position embedding as a table: cosines and sines of every position, made once per model.

Legend: X positions, D head dim.
Idea: Su et al., "RoFormer" (2021). Beyond the length of training: positions divided by a factor (Chen et al., "Position
Interpolation", 2023), a base that grows with the length ("NTK-aware", u/bloc97 and u/emozilla, 2023), Peng et al.,
"YaRN" (2023), Ding et al., "LongRoPE" (2024), and what Llama 3.1 does (Meta, 2024).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fa_research.config import RopeScaling, RopeType


def build_cos_sin(
    num_positions: int,
    head_dim: int,
    theta: float,
    scaling: RopeScaling,
    device: torch.device | str | None = None,
    *,
    rope_len: int | None = None,
) -> Tensor:
    """float32 [X, D] = cos(D / 2) | sin(D / 2), each times the attention factor. The angles are computed in float64: at
    position 100,000 a float32 angle is off by some thousandths of a radian already.

    rope_len: tokens of the longest sequence, by which `dynamic` chooses its base and `longrope` its factors, once for
        all positions; None: `num_positions`.
    """
    positions = torch.arange(num_positions, dtype=torch.float64, device=device)
    longest = num_positions if rope_len is None else rope_len
    angles = torch.outer(positions, inverse_frequencies(head_dim, theta, scaling, device, rope_len=longest))
    factor = attention_factor(scaling)
    table = torch.empty(num_positions, head_dim, dtype=torch.float32, device=device)
    cos, sin = table.chunk(2, dim=1)
    cos.copy_(angles.cos().mul_(factor))
    sin.copy_(angles.sin().mul_(factor))
    return table


def inverse_frequencies(
    head_dim: int,
    theta: float,
    scaling: RopeScaling,
    device: torch.device | str | None = None,
    *,
    rope_len: int = 0,
) -> Tensor:
    """Radians per position of each pair of dimensions, float64 [D / 2], for sequences of up to `rope_len` tokens."""
    if scaling.type is RopeType.dynamic:
        theta *= _dynamic_growth(head_dim, scaling, rope_len)
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim
    frequencies = theta**-exponents
    match scaling.type:
        case RopeType.none | RopeType.dynamic:
            return frequencies
        case RopeType.linear:
            return frequencies / scaling.factor
        case RopeType.llama3:
            kept = _kept_by_llama3(frequencies, scaling)
        case RopeType.yarn:
            kept = _kept_by_yarn(head_dim, theta, scaling).to(frequencies.device)
        case RopeType.longrope:
            long = rope_len > scaling.original_max_position
            return frequencies / frequencies.new_tensor(scaling.long_factor if long else scaling.short_factor)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def attention_factor(scaling: RopeScaling) -> float:
    """What queries and keys are multiplied by, so that attention stays as sharp over more keys; 1 for most types."""
    if scaling.type not in (RopeType.yarn, RopeType.longrope):
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.factor <= 1:
        return 1.0
    growth = math.log(scaling.factor)
    if scaling.type is RopeType.longrope:
        return math.sqrt(1 + growth / math.log(scaling.original_max_position))
    if scaling.mscale and scaling.mscale_all_dim:
        return (0.1 * scaling.mscale * growth + 1) / (0.1 * scaling.mscale_all_dim * growth + 1)
    return 0.1 * growth + 1


def _dynamic_growth(head_dim: int, scaling: RopeScaling, rope_len: int) -> float:
    """Of the base: such that the slowest pair turns as far within the longest sequence as it did within the original
    length."""
    stretch = max(rope_len / scaling.original_max_position, 1.0)
    return (scaling.factor * stretch - (scaling.factor - 1)) ** (head_dim / (head_dim - 2))


def _kept_by_llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """1 for pairs that turn more than ``high_freq_factor`` times within the original length, 0 for those that turn less
    than ``low_freq_factor`` times, a blend by turns between; [D / 2]."""
    turns = scaling.original_max_position * frequencies / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return kept.clamp(0, 1)


def _kept_by_yarn(head_dim: int, theta: float, scaling: RopeScaling) -> Tensor:
    """1 for pairs that turn more than ``beta_fast`` times within the original length, 0 for those that turn less than
    ``beta_slow`` times, a blend by index between; [D / 2]. With ``truncate`` the borders are whole indices."""

    def pair_with_turns(turns: float) -> float:
        return (
            head_dim * math.log(scaling.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(theta))
        )

    first, last = pair_with_turns(scaling.beta_fast), pair_with_turns(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    if first == last:
        last += 0.001  # a step, as in transformers
    pairs = torch.arange(head_dim // 2, dtype=torch.float64)
    return 1 - ((pairs - first) / (last - first)).clamp(0, 1)
