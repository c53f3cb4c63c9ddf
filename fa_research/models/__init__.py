"""Decoders by architecture. They emit attention specs and call `attend`; of caches and backends they know nothing."""

from __future__ import annotations

from pathlib import Path

import torch

from fa_research.config import ModelConfig
from fa_research.models.llama import LlamaForCausalLM, attention_specs
from fa_research.models.loader import Progress, load_weights, silent

__all__ = ["ARCHITECTURES", "LlamaForCausalLM", "attention_specs", "build_model", "load_weights"]

ARCHITECTURES = {"llama": LlamaForCausalLM}


def build_model(
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    seed: int,
    architecture: str = "llama",
    progress: Progress = silent,
) -> LlamaForCausalLM:
    """A model on ``device`` in ``dtype``, with the weights of the folder ``config.path``, or random ones from ``seed``
    where that is None. ``progress`` shows how far loading is.

    Raises:
        ValueError: an unknown architecture.
        CheckpointError: a folder whose weights are not those that ``config`` describes.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"architecture={architecture!r} is unknown; choose one of {', '.join(sorted(ARCHITECTURES))}"
        )
    model = ARCHITECTURES[architecture](config, dtype=dtype, device=device)
    if config.path is None:
        model.init_random_(seed)
    else:
        load_weights(model, Path(config.path).expanduser(), progress)
    return model
