"""The decoder and its weights. It emits attention specs and calls `attend`; of caches and backends it knows nothing."""

from __future__ import annotations

import torch

from fa_research.config import ModelConfig, checkpoint_folder
from fa_research.models.decoder import Decoder
from fa_research.models.layers import attention_specs
from fa_research.models.loader import Progress, load_weights, silent

__all__ = ["Decoder", "attention_specs", "build_model", "load_weights"]


def build_model(
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    seed: int,
    rope_len: int | None = None,
    progress: Progress = silent,
) -> Decoder:
    """A model on ``device`` in ``dtype``, with the weights of the folder ``config.path``, or random ones from ``seed``
    where that is None. ``rope_len``: the longest sequence of the run, in tokens, as `Decoder` takes it. ``progress``
    shows how far loading is.

    Raises:
        CheckpointError: a folder whose weights are not those that ``config`` describes.
    """
    model = Decoder(config, dtype=dtype, device=device, rope_len=rope_len)
    if config.path is None:
        model.init_random_(seed)
    else:
        load_weights(model, checkpoint_folder(config.path), progress)
    return model
