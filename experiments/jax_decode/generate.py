"""Greedy generation by one set of weights in two frameworks: python -m experiments.jax_decode.generate [attention]

`attention` is xla (the default) or a backend: torch, triton, fa3. A random model of the shapes of
configs/model/tiny.yaml, in float32; the tokens must be equal, one for one.
"""

from __future__ import annotations

import sys
import time

import numpy as np
import torch

from experiments.jax_decode.decoder import JaxDecoder
from fa_research import backends
from fa_research.backends import BackendSettings
from fa_research.config import ModelConfig
from fa_research.engine.model_runner import ModelRunner
from fa_research.kv_cache import PagedAllocator, PagedKVCache, ReqToTokenPool, TokenToKVPool
from fa_research.models import Decoder

PROMPTS = [list(b"Attention over pages,"), list(b"read by two frameworks, "), list(b"is the same.")]
STEPS, PAGE_SIZE, NUM_PAGES = 32, 16, 64


def in_torch(model: Decoder, device: torch.device) -> tuple[np.ndarray, float]:
    """Tokens [B, STEPS], and the median seconds of a decode step, eager."""
    config = model.config
    settings = BackendSettings(device, torch.float32, PAGE_SIZE, 256)
    backend = backends.create("torch" if device.type == "cpu" else "triton", settings, model.attention_specs)
    heads = {"num_kv_heads": config.num_kv_heads, "head_dim": config.head_dim, "v_head_dim": config.head_dim}
    cache = PagedKVCache(
        ReqToTokenPool(len(PROMPTS), 256, page_size=PAGE_SIZE, device=device),
        PagedAllocator(NUM_PAGES, PAGE_SIZE),
        TokenToKVPool(
            NUM_PAGES, PAGE_SIZE, num_layers=config.num_layers, dtype=torch.float32, device=device, **heads
        ),
    )
    runner, requests = ModelRunner(model, backend, cache), [cache.open() for _ in PROMPTS]
    new, tokens, times = [list(prompt) for prompt in PROMPTS], [], []
    for _ in range(STEPS):
        start = time.perf_counter()
        logits = runner.extend(requests, new)
        assert logits is not None
        tokens.append(logits.argmax(-1).tolist())
        times.append(time.perf_counter() - start)
        new = [[token] for token in tokens[-1]]
    return np.array(tokens).T, float(np.median(times[1:]))


def in_jax(model: Decoder, attention: str) -> tuple[np.ndarray, float]:
    """The same, with the weights of the same model."""
    decoder = JaxDecoder(model, page_size=PAGE_SIZE, num_pages=NUM_PAGES, attention=attention)
    decoder.generate(PROMPTS, STEPS)  # compiles
    start = time.perf_counter()
    tokens = decoder.generate(PROMPTS, STEPS)
    return tokens, (time.perf_counter() - start) / STEPS


def main() -> None:
    attention = sys.argv[1] if len(sys.argv) > 1 else "xla"
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    model = Decoder(ModelConfig(), dtype=torch.float32, device=device)
    model.init_random_(0)
    ours, torch_time = in_torch(model, device)
    theirs, jax_time = in_jax(model, attention)
    equal = bool((ours == theirs).all())
    print(f"tokens of torch and of JAX ({attention}) on {device}: {'equal' if equal else 'DIFFERENT'}")
    print(f"a step: torch, eager {torch_time * 1e3:.2f} ms; JAX {jax_time * 1e3:.2f} ms")
    if not equal:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
