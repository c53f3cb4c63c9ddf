"""Decoders by architecture. They emit attention specs and call `attend`; of caches and backends they know nothing."""

from __future__ import annotations

import torch

from fa_research.config import ModelConfig
from fa_research.models.llama import LlamaForCausalLM, attention_specs

__all__ = ["ARCHITECTURES", "LlamaForCausalLM", "attention_specs", "build_model"]

ARCHITECTURES = {"llama": LlamaForCausalLM}


def build_model(
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    seed: int,
    architecture: str = "llama",
) -> LlamaForCausalLM:
    """A model with random weights from ``seed``, on ``device`` in ``dtype``. Raises ValueError for an unknown
    architecture."""
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"architecture={architecture!r} is unknown; choose one of {', '.join(sorted(ARCHITECTURES))}"
        )
    model = ARCHITECTURES[architecture](config, dtype=dtype, device=device)
    model.init_random_(seed)
    return model
