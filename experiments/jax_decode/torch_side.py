"""The same model and prompts in torch, for the two scripts that compare."""

from __future__ import annotations

from collections.abc import Sequence

from fa_research import backends
from fa_research.backends import BackendSettings
from fa_research.engine.model_runner import ModelRunner
from fa_research.kv_cache import CachedRequest, PagedAllocator, PagedKVCache, ReqToTokenPool, TokenToKVPool
from fa_research.models import Decoder


def make_runner(
    model: Decoder, backend: str, prompts: Sequence[Sequence[int]], steps: int, page_size: int
) -> tuple[ModelRunner, list[CachedRequest]]:
    """A runner with room for the prompts and `steps` tokens each, and an empty request for each prompt."""
    config, embedding = model.config, model.embedding
    device, dtype = embedding.device, embedding.dtype
    longest = max(map(len, prompts)) + steps
    pages = len(prompts) * -(-longest // page_size)
    settings = BackendSettings(device, dtype, page_size, longest)
    heads = {"num_kv_heads": config.num_kv_heads, "head_dim": config.head_dim, "v_head_dim": config.head_dim}
    cache = PagedKVCache(
        ReqToTokenPool(len(prompts), longest, page_size=page_size, device=device),
        PagedAllocator(pages, page_size),
        TokenToKVPool(pages, page_size, num_layers=config.num_layers, dtype=dtype, device=device, **heads),
    )
    runner = ModelRunner(model, backends.create(backend, settings, model.attention_specs), cache)
    return runner, [cache.open() for _ in prompts]
