"""Which ids may be drawn, by definition, and the parameters and logits that sampling is tested with.

Shapes: B requests, X vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Params:
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


FILTERS = [
    Params(),
    Params(0.7),
    Params(1.5, top_k=5),
    Params(top_k=1),
    Params(0.8, top_p=0.9),
    Params(top_p=0.05),
    Params(top_p=1e-6),
    Params(min_p=0.1),
    Params(2.0, min_p=1.0),
    Params(1.3, 20, 0.8),
    Params(0.9, 40, 0.95, 0.05),
    Params(1e-3, 50, 0.99, 0.01),
    Params(0.0, 5, 0.5),
]
SAMPLED = [params for params in FILTERS if params.temperature > 0]


def packed(params: list[Params], device: str = DEVICE) -> list[Tensor]:
    """Temperature, top-k, top-p and min-p as ops.sample takes them."""
    columns = [
        torch.tensor([getattr(p, name) for p in params])
        for name in ("temperature", "top_k", "top_p", "min_p")
    ]
    columns[1] = columns[1].int()
    return [column.to(device) for column in columns]


def logits_of(kind: str, rows: int, vocab: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(vocab)
    x = torch.randn(rows, vocab, generator=generator)
    if kind == "peaked":
        x = x * 2 + 12 * (torch.rand(rows, vocab, generator=generator) > 1 - 20 / vocab)
    elif kind == "ties":
        x = (x * 2).round()
    elif kind == "equal":
        x = torch.full_like(x, -3.5)
    elif kind == "masked":
        x[torch.rand(rows, vocab, generator=generator) > 0.1] = float("-inf")
        x[:, vocab // 2] = 0.5
    elif kind == "wide":
        x = x.sign() * 10 ** (x * 3)
    return x.to(dtype).to(DEVICE)


def defined(x_X: Tensor, params: Params) -> Tensor:
    """Which ids may be drawn, by the definition, in float64: bool [X]."""
    y = x_X.double().cpu() / params.temperature
    kept = y > float("-inf")
    if 0 < params.top_k < len(y):
        kept &= y >= sorted(y.tolist())[-params.top_k]
    probabilities = torch.where(kept, y, float("-inf")).softmax(0)
    if params.top_p < 1:
        above = torch.tensor([probabilities[probabilities > p].sum().item() for p in probabilities.unique()])
        least = probabilities.unique()[(above < float(torch.tensor(params.top_p))) | (above == 0)].min()
        kept &= probabilities >= least
    return kept & (probabilities >= params.min_p * probabilities.max() * (1 - 1e-7))
