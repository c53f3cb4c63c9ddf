"""How tokens are chosen from logits: parameters per request, and the tokens that follow a prefill. Decode steps draw
theirs in `decode.py`, inside the captured step.

Legend: B requests, X vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fa_research.config import Config
from fa_research.config.validate import sampling_problems, seed_problem
from fa_research.errors import ConfigError
from fa_research.kernels import ops

_SEEDS = 2**63


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request's tokens are drawn: temperature, then top-k, then top-p of what is left, then min-p, as Hugging
    Face's warpers in that order (`ops.sample`). The draw at a position depends on nothing else but `seed`. Raises
    ConfigError for values out of range."""

    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # 0: all
    top_p: float = 1.0  # 1: all
    min_p: float = 0.0  # of the likeliest token's probability; 0: all
    seed: int = 0

    def __post_init__(self) -> None:
        problems = [*sampling_problems(self.temperature, self.top_k, self.top_p, self.min_p)]
        if problem := seed_problem("sampling.seed", self.seed):
            problems.append(problem)
        if problems:
            raise ConfigError("; ".join(problems))


GREEDY = SamplingParams()


def sampling_params(config: Config, batch_size: int) -> list[SamplingParams]:
    """Of each request, as `sampling` of the config has them; request i draws from the stream `seed + i`."""
    asked = config.sampling
    first = config.seed if asked.seed is None else asked.seed
    return [
        SamplingParams(asked.temperature, asked.top_k, asked.top_p, asked.min_p, (first + i) % _SEEDS)
        for i in range(batch_size)
    ]


def pack(
    params: Sequence[SamplingParams], device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Temperature, top-k, top-p, min-p and seed [B] as ops.sample takes them, in two copies that are not waited for."""
    pinned = device.type == "cuda"
    floats = torch.tensor(
        [[getattr(p, name) for p in params] for name in ("temperature", "top_p", "min_p")],
        dtype=torch.float32,
        pin_memory=pinned,
    )
    integers = torch.tensor(
        [[p.top_k for p in params], [p.seed for p in params]], dtype=torch.int64, pin_memory=pinned
    )
    temperature_B, top_p_B, min_p_B = floats.to(device, non_blocking=True)
    top_k_B, seed_B = integers.to(device, non_blocking=True)
    return temperature_B, top_k_B.int(), top_p_B, min_p_B, seed_B


def sample(
    logits_BX: Tensor, params: Sequence[SamplingParams], positions_B: Tensor | Sequence[int]
) -> Tensor:
    """One token for each row, int64 [B], on the logits' device. `positions_B`: the index that the token will have in
    its sequence, which after a prefill is the number of tokens in the cache."""
    assert len(params) == logits_BX.shape[0]
    if all(p.temperature == 0 for p in params):
        return ops.argmax(logits_BX)
    device = logits_BX.device
    tokens_B = torch.empty(len(params), dtype=torch.int64, device=device)
    positions_B = torch.as_tensor(positions_B).to(device, non_blocking=True)
    ops.sample(logits_BX, *pack(params, device), positions_B, tokens_B)
    return tokens_B
