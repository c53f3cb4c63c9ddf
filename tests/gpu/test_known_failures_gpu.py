"""Known failures of other engines that only CUDA graphs and real kernels can have, each a named test.

The bodies run on the CPU too, on the static-buffer path and at small sizes, so that a mistake in a test shows without a
GPU.

Legend: B requests, H query heads, D head dim.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor

from fa_research import backends
from fa_research.attention.reference import attention
from fa_research.backends import AttentionBackend, BackendSettings
from fa_research.backends.fa3 import FA3Backend
from fa_research.backends.flash_attn_provider import Provider
from fa_research.batch import ForwardMode
from fa_research.config import GraphMode
from fa_research.engine.attention_stack import AttentionStack
from fa_research.engine.decode import DecodeRunner
from fa_research.engine.model_runner import ModelRunner
from fa_research.kv_cache import CachedRequest
from fa_research.masks import Causal, Chunked, Mask
from fa_research.metadata import FlashAttentionMetadata
from fa_research.spec import AttentionSpec
from tests.engine.lab import FA3, GPU, PADDED, Lab, MakeBackend, Place, decode, places, prompts_of
from tests.helpers import age, assert_accurate, make_cache

PAGE_SIZE = 16


class StackLab:
    """One layer's attention alone, for contexts of any length: graph or eager steps, and float64 over what the cache
    holds. Keys and values are random everywhere, so nothing is prefilled."""

    def __init__(
        self,
        place: Place,
        longest: int,
        batch_size: int,
        *,
        heads: tuple[int, int] = (8, 2),
        mask: Mask | None = None,
        page_size: int = PAGE_SIZE,
        make_backend: MakeBackend | None = None,
    ) -> None:
        self.place, self.longest = place, longest
        device = torch.device(place.device)
        self.spec = AttentionSpec(*heads, 128, 128, 128**-0.5, mask=mask or Causal())
        settings = BackendSettings(device, place.dtype, page_size, longest)
        reasons = backends.reasons_against(place.backend, settings, [self.spec])
        if reasons:
            pytest.skip(f"{place.backend}: {'; '.join(reasons)}")
        make = make_backend or (lambda settings, specs: backends.create(place.backend, settings, specs))
        self.backend: AttentionBackend = make(settings, (self.spec,))
        pages = batch_size * (-(-longest // page_size) + 1)
        self.cache = make_cache(
            pages, page_size, max_requests=batch_size, max_context_len=longest, num_layers=1, kv_heads=heads[1],
            head_dim=128, dtype=place.dtype, device=place.device, check_invariants=False,
        )  # fmt: skip
        age(self.cache, 0)
        self.cache.kv.fill_random(0)
        self.cache.kv.poison([0])
        self.max_tokens = max(8, batch_size)
        self.stack = self._stack()
        self.requests = [self.cache.open() for _ in range(batch_size)]
        self.cache.reserve(self.requests, [longest] * batch_size)

    def decoder(self, mode: GraphMode, *batch_sizes: int) -> DecodeRunner:
        """With a stack of its own (the same numbers): two decoders of one would write to the same outputs."""
        runner = ModelRunner(self._stack(), self.backend, self.cache)
        return DecodeRunner(
            runner, mode=mode, batch_sizes=batch_sizes, max_seq_len_k=self.longest, reserve_ahead=1
        )

    def _stack(self) -> AttentionStack:
        device = torch.device(self.place.device)
        return AttentionStack(
            (self.spec,), max_tokens=self.max_tokens, dtype=self.place.dtype, device=device, seed=0
        )

    def step(self, decoder: DecodeRunner, lens: Sequence[int]) -> Tensor:
        """One step in which request i reaches `lens[i]` tokens; the outputs [B, H, D], a copy."""
        requests = self.requests[: len(lens)]
        for request, seq_len in zip(requests, lens, strict=True):
            request.seq_len = seq_len - 1
        decoder.start(requests, [0] * len(lens))
        decoder.step()
        decoder.flush()
        stack = decoder.runner.model
        assert isinstance(stack, AttentionStack)
        return stack.outputs[ForwardMode.DECODE, decoder.padded_size][0][: len(lens)].clone()

    def check(self, outs: Tensor, lens: Iterable[int]) -> None:
        """The outputs of a step against float64 over the cache."""
        kv, table = self.cache.kv, self.cache.req_to_token.req_to_token
        for i, seq_len in enumerate(lens):
            slots = table[self.requests[i].row, :seq_len].long()
            data = (self.stack.q_THD[i : i + 1], kv.k(0)[slots], kv.v(0)[slots])
            position = torch.tensor([seq_len - 1], device=slots.device)
            exact, low = (
                attention(*data, position, self.spec, compute_dtype=dtype)[0]
                for dtype in (torch.float64, self.place.dtype)
            )
            assert_accurate(outs[i : i + 1], exact, low, what=f"request {i} of {seq_len} tokens")


# 2: graph decode = eager decode beyond the chunk length


@pytest.mark.parametrize("page_size", [1, 16, 128])
@pytest.mark.parametrize("place", places(PADDED, *GPU))
def test_known_failure_2_graph_equals_eager_beyond_the_chunk(place: Place, page_size: int) -> None:
    on_gpu = place.device == "cuda"
    chunk = 128 if on_gpu or page_size == 128 else 16
    lens = (chunk - 3, 3 * chunk - 2, 5) if on_gpu else (chunk - 3, chunk + 9, 5)
    lab = Lab(place, page_size, Chunked(chunk), max_context_len=512)
    prompts = prompts_of(*lens)
    outcomes = []
    for mode in (place.mode, GraphMode.off):
        requests, first = lab.prefill(prompts)
        result = decode(lab.decoder(4, mode=mode), requests, prompts, first, 12)
        for sequence, logits in zip(result.sequences, result.logits, strict=True):
            lab.check(sequence[:-1], logits, str(mode))
        outcomes.append(result)
        for request in requests:
            lab.cache.close(request)
    if not on_gpu:
        assert outcomes[0].sequences == outcomes[1].sequences


# 4: stale scheduler metadata where the number of splits changes with the length

LENS = {"cpu": (1, 63, 64, 127, 128, 200), "cuda": (1, 63, 64, 127, 128, 1023, 4095, 4097, 16384, 32767)}


def across_lengths(lab: StackLab, sizes: Sequence[int]) -> None:
    """Graphs are captured at length 1; replays jump between lengths, and batches mix the longest with the shortest."""
    graphs = lab.decoder(lab.place.mode, *sizes)
    eager = lab.decoder(GraphMode.off)
    lens = LENS[lab.place.device]
    uniform = [[n] * count for n in (*lens, *reversed(lens)) for count in (1, max(sizes) - 1)]
    mixed = [[lens[(i + turn) % len(lens)] for i in range(max(sizes) - 1)] for turn in range(len(lens))]
    for batch in [*uniform, *mixed, *uniform[::-3]]:
        outs, expected = lab.step(graphs, batch), lab.step(eager, batch)
        lab.check(outs, batch)
        lab.check(expected, batch)
        torch.testing.assert_close(outs, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("heads", [(8, 2), (8, 8)])
@pytest.mark.parametrize("place", places(PADDED, *GPU))
def test_known_failure_4_replay_across_changing_splits(place: Place, heads: tuple[int, int]) -> None:
    across_lengths(StackLab(place, max(LENS[place.device]) + 1, 4, heads=heads), (1, 4))


@pytest.mark.gpu
def test_known_failure_4_without_scheduler_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = StackLab(FA3, max(LENS["cuda"]) + 1, 4)
    assert isinstance(lab.backend, FA3Backend)
    monkeypatch.setattr(lab.backend._kernels, "schedule", MethodType(Provider.schedule, lab.backend._kernels))
    across_lengths(lab, (1, 4))
    metadata = lab.backend.forward_metadata
    assert metadata is not None and set(metadata.plans.values()) == {None}


# 5: scheduler metadata of the wrong size


class SizedFA3(FA3Backend):
    """FA3, which notes how large the scheduler metadata of each batch size is."""

    name = "sized_fa3"
    sizes: dict[int, int]

    def plan(self, metadata: FlashAttentionMetadata, lowering: Any) -> None:
        super().plan(metadata, lowering)
        schedule = metadata.plans[lowering.spec]
        if schedule is not None:
            self.sizes[metadata.batch_size] = schedule.numel()


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [(8, 2), (32, 8)])
def test_known_failure_5_scheduler_metadata_fits_every_captured_batch_size(heads: tuple[int, int]) -> None:
    """With num_splits left to the kernel: what a captured step plans is as large as what a fresh pass of that batch
    size would plan."""
    sizes = (1, 2, 3, 4, 8, 16, 31, 32, 33, 64, 96, 128)
    lab = StackLab(FA3, 2048, max(sizes), heads=heads, make_backend=SizedFA3)
    assert isinstance(lab.backend, SizedFA3)
    lab.backend.sizes = {}
    graphs = lab.decoder(GraphMode.on, *sizes)
    captured = dict(lab.backend.sizes)
    if not captured:
        pytest.skip(f"{lab.backend.provider} takes no scheduler metadata")
    assert set(captured) == set(sizes)
    eager = lab.decoder(GraphMode.simulate, *sizes)  # the same bound on the lengths, without a capture
    lab.backend.sizes.clear()
    for size in sizes:
        lens = [1 + 29 * i % 2000 for i in range(size)]
        outs = lab.step(eager, lens)
        assert captured[size] == lab.backend.sizes[size], f"batch size {size}"
        replayed = lab.step(graphs, lens)
        assert graphs.padded_size == size
        torch.testing.assert_close(replayed, outs, rtol=2e-2, atol=2e-2)
    lab.check(replayed, lens)


# 16: captured short, replayed at more than 128k tokens


@pytest.mark.parametrize("place", places(PADDED, *GPU))
@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_known_failure_16_captured_short_replayed_at_the_longest(place: Place, page_size: int) -> None:
    longest = 131072 + 200 if place.device == "cuda" else 3000
    lab = StackLab(place, longest, 2, page_size=page_size)
    graphs = lab.decoder(place.mode, 2)  # captured on padding: every length is 1
    for lens in ([longest, 1], [1, 2], [longest - 1, longest], [longest // 2, longest]):
        lab.check(lab.step(graphs, lens), lens)


# What a test would not see if its own parts were wrong.


def test_the_stack_lab_sees_a_wrong_length() -> None:
    lab = StackLab(PADDED, 64, 2)
    graphs = lab.decoder(GraphMode.simulate, 2)
    outs = lab.step(graphs, [40, 9])
    lab.check(outs, [40, 9])
    with pytest.raises(AssertionError, match="request 1 of 10 tokens"):
        lab.check(outs, [40, 10])
    requests: list[CachedRequest] = lab.requests
    assert [r.seq_len for r in requests] == [40, 9]
    assert dataclasses.replace(lab.spec) == lab.spec
