"""What a greedy decode step costs from torch and from JAX: python -m experiments.jax_decode.steps OUT_FOLDER [--small]

A random model of the shapes of Llama 3.2 1B in bfloat16, 8 requests of 1,024 tokens, pages of 16; the weights are the
same memory. From torch: eager, and in one CUDA graph. From JAX: one program, its attention by XLA or by a backend.
--small: a few tokens of a tiny model in float32, on any machine, to see that it runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median

import numpy as np
import torch

from experiments.jax_decode.decoder import JaxDecoder
from experiments.jax_decode.rows import publish
from experiments.jax_decode.torch_side import make_runner
from fa_research.config import GraphMode, ModelConfig
from fa_research.engine.decode import DecodeRunner
from fa_research.interop.dlpack import import_jax
from fa_research.models import Decoder
from fa_research.tracking import Row, Status
from fa_research.tracking.failures import failed_row

jax = import_jax()

PAGE_SIZE, CHAIN, ROUNDS = 16, 32, 5
STEPS = CHAIN * (ROUNDS + 1) + 1  # the first token is the prefill's
Prompts = list[list[int]]


def in_torch(
    model: Decoder, prompts: Prompts, backend: str, mode: GraphMode
) -> tuple[list[float], np.ndarray]:
    """Microseconds a step of each round, and the tokens of the first [B, CHAIN + 1]."""
    runner, requests = make_runner(model, backend, prompts, STEPS, PAGE_SIZE)
    longest = len(prompts[0]) + STEPS
    decoder = DecodeRunner(
        runner, mode=mode, batch_sizes=[len(prompts)], max_seq_len_k=longest, reserve_ahead=CHAIN
    )
    logits = runner.extend(requests, prompts)
    assert logits is not None
    tokens = [logits.argmax(-1)]
    decoder.start(requests, tokens[0])
    for _ in range(CHAIN):
        decoder.step()
        tokens.append(decoder.state.input_ids_B[: len(prompts)].clone())

    found = torch.stack(tokens, 1).cpu().numpy()  # waits for all of it

    def chain() -> None:
        for _ in range(CHAIN):
            decoder.step()
        if model.embedding.is_cuda:
            torch.cuda.synchronize()

    return [timed(chain) for _ in range(ROUNDS)], found


def in_jax(model: Decoder, prompts: Prompts, attention: str) -> tuple[list[float], np.ndarray]:
    """The same."""
    pages = len(prompts) * -(-(len(prompts[0]) + STEPS) // PAGE_SIZE)
    decoder = JaxDecoder(model, page_size=PAGE_SIZE, num_pages=pages, attention=attention)
    tokens = [decoder.start(prompts, STEPS)]
    for _ in range(CHAIN):
        tokens.append(decoder.step(tokens[-1]))
    last, found = tokens[-1], np.stack([np.asarray(x) for x in tokens], axis=1)

    def chain() -> None:
        nonlocal last
        for _ in range(CHAIN):
            last = decoder.step(last)
        jax.block_until_ready(last)

    return [timed(chain) for _ in range(ROUNDS)], found


def timed(chain: Callable[[], None]) -> float:
    start = time.perf_counter()
    chain()
    return (time.perf_counter() - start) / CHAIN * 1e6


def measure(small: bool) -> Iterator[Row]:
    """A row a variant: what fails costs its own row only. Tokens are compared with the first variant's."""
    device = torch.device("cpu") if small else torch.device("cuda", 0)
    model = Decoder(
        tiny() if small else llama3_1b(), dtype=torch.float32 if small else torch.bfloat16, device=device
    )
    model.init_random_(0)
    batch, length = (2, 20) if small else (8, 1024)
    prompts = np.random.default_rng(0).integers(0, model.config.vocab_size, (batch, length)).tolist()
    names = ("torch",) if small else ("fa3", "triton")
    modes = (GraphMode.off,) if small else (GraphMode.off, GraphMode.on)
    cases = {
        f"torch {name}, graph {mode.value}": partial(in_torch, backend=name, mode=mode)
        for name in names
        for mode in modes
    }
    cases |= {f"jax {name}": partial(in_jax, attention=name) for name in (*names, "xla")}
    first: np.ndarray | None = None
    for name, run in cases.items():
        config = {"variant": name, "batch_size": batch, "context_len": length, "model": model.config.name}
        try:
            times, tokens = run(model, prompts)
        except Exception as error:  # the next variant may still work
            yield failed_row(error, config)
            continue
        first = tokens if first is None else first
        metrics = {"decode_step_us": median(times), "tokens_equal_fraction": float((tokens == first).mean())}
        yield Row(Status.ok, config, metrics=metrics, samples={"decode_step_us": times})


def tiny() -> ModelConfig:
    return ModelConfig(max_context_len=512)


def llama3_1b() -> ModelConfig:
    return ModelConfig(
        name="llama3_1b", num_layers=16, hidden_size=2048, num_heads=32, num_kv_heads=8, head_dim=64,
        intermediate_size=8192, vocab_size=128256, max_context_len=4096, rope_theta=500000.0, tie_word_embeddings=True,
    )  # fmt: skip


if __name__ == "__main__":
    publish(measure)
