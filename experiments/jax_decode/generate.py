"""Greedy generation by one set of weights in two frameworks: python -m experiments.jax_decode.generate [attention]

`attention` is xla (the default) or a backend: torch, triton. A random model of the shapes of configs/model/tiny.yaml,
in float32; the tokens must be equal, one for one. What a step costs: steps.py.
"""

from __future__ import annotations

import sys

import numpy as np
import torch

from experiments.jax_decode.decoder import JaxDecoder
from experiments.jax_decode.torch_side import make_runner
from fa_research.config import ModelConfig
from fa_research.models import Decoder

PROMPTS = [list(b"Attention over pages,"), list(b"read by two frameworks, "), list(b"is the same.")]
STEPS, PAGE_SIZE, NUM_PAGES = 32, 16, 64


def in_torch(model: Decoder) -> np.ndarray:
    """Tokens [B, STEPS], each by an eager extend pass."""
    backend = "triton" if model.embedding.is_cuda else "torch"
    runner, requests = make_runner(model, backend, PROMPTS, STEPS, PAGE_SIZE)
    new, tokens = [list(prompt) for prompt in PROMPTS], []
    for _ in range(STEPS):
        logits = runner.extend(requests, new)
        assert logits is not None
        tokens.append(logits.argmax(-1).tolist())
        new = [[token] for token in tokens[-1]]
    return np.array(tokens).T


def main() -> None:
    attention = sys.argv[1] if len(sys.argv) > 1 else "xla"
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    model = Decoder(ModelConfig(), dtype=torch.float32, device=device)
    model.init_random_(0)
    decoder = JaxDecoder(model, page_size=PAGE_SIZE, num_pages=NUM_PAGES, attention=attention)
    equal = bool((in_torch(model) == decoder.generate(PROMPTS, STEPS)).all())
    print(f"tokens of torch and of JAX ({attention}) on {device}: {'equal' if equal else 'DIFFERENT'}")
    if not equal:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
