"""What the engine's tests run: a small model with strong attention over a used cache full of NaN, and the same model as
one float64 pass over a whole sequence, with no cache, no pages and no batch.

Legend: T tokens of one sequence, B requests, X vocabulary, H query heads, K KV heads, D head dim, V value head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from fa_research import backends
from fa_research.attention.reference import attention
from fa_research.backends import AttentionBackend, BackendSettings
from fa_research.config import GraphMode, MaskConfig, ModelConfig
from fa_research.engine.decode import DecodeRunner
from fa_research.engine.model_runner import ModelRunner
from fa_research.kv_cache import CachedRequest, PagedKVCache
from fa_research.masks import Causal, Mask
from fa_research.models import Decoder
from fa_research.spec import AttentionSpec
from tests.helpers import age, assert_accurate, make_cache

MakeBackend = Callable[[BackendSettings, Sequence[AttentionSpec]], AttentionBackend]
VOCABULARY = 101
FINITE = 3.0e4  # stands for NaN where a kernel may multiply the unused end of a request's last page by zero


@dataclass(frozen=True)
class Place:
    """Where and how decode steps run."""

    device: str
    backend: str
    dtype: torch.dtype
    mode: GraphMode

    def __str__(self) -> str:
        return f"{self.device}-{self.backend}-{str(self.dtype).removeprefix('torch.')}-{self.mode}"


def places(*chosen: Place) -> list[object]:
    """Parameters for `pytest.mark.parametrize`; those on the GPU are marked so."""
    marks = {"cuda": pytest.mark.gpu, "cpu": ()}
    return [pytest.param(place, id=str(place), marks=marks[place.device]) for place in chosen]


EAGER = Place("cpu", "torch", torch.float32, GraphMode.off)
PADDED = Place("cpu", "torch", torch.float32, GraphMode.simulate)
EXACT = Place("cpu", "torch", torch.float64, GraphMode.simulate)
INTERPRETED = Place("cpu", "triton", torch.float32, GraphMode.simulate)
FA3 = Place("cuda", "fa3", torch.bfloat16, GraphMode.on)
FA2 = Place("cuda", "fa2", torch.bfloat16, GraphMode.on)
TRITON = Place("cuda", "triton", torch.bfloat16, GraphMode.on)
TRITON_EAGER = Place("cuda", "triton", torch.bfloat16, GraphMode.off)
FLASHINFER = Place("cuda", "flashinfer", torch.bfloat16, GraphMode.on)
GPU = (FA3, FA2, TRITON, FLASHINFER)


class WholeSequence:
    """`Attend` over one sequence from its start: plain rotation, attention by its definition, in q's dtype."""

    def __init__(self, specs: Sequence[AttentionSpec]) -> None:
        self.specs = specs

    def __call__(
        self,
        layer_id: int,
        q_THD: Tensor,
        k_TKD: Tensor,
        v_TKV: Tensor,
        *,
        rope: Tensor | None,
        sinks_H: Tensor | None = None,
    ) -> Tensor:
        positions_T = torch.arange(q_THD.shape[0], device=q_THD.device)
        if rope is not None:
            q_THD, k_TKD = (_rotated(x, rope[positions_T]) for x in (q_THD, k_TKD))
        spec, dtype = self.specs[layer_id], q_THD.dtype
        return attention(q_THD, k_TKD, v_TKV, positions_T, spec, sinks_H=sinks_H, compute_dtype=dtype)[0]


def _rotated(x_THD: Tensor, cos_sin_TD: Tensor) -> Tensor:
    x = x_THD.to(torch.promote_types(x_THD.dtype, torch.float32))
    cos, sin = (half[:, None].to(x.dtype) for half in cos_sin_TD.chunk(2, dim=-1))
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_THD.dtype)


@dataclass
class Lab:
    """Model, backend and cache for one test.

    poison: every slot holds NaN until something writes it; for `fa2` and `fa3`, whose kernels may multiply the unused
    end of a request's own last page by an exact zero, a large number, and NaN in the sink page alone.
    specs: what the backend is made for, where layers are to differ; None: the model's own.
    loaded: a model with its own weights, instead of a random one of the lab's.
    """

    place: Place
    page_size: int = 16
    mask: Mask = field(default_factory=Causal)
    sink: bool = False
    softcap: float = 0.0
    max_context_len: int = 160
    num_pages: int | None = None
    max_requests: int = 8
    num_layers: int = 2
    make_backend: MakeBackend | None = None
    specs: tuple[AttentionSpec, ...] | None = None
    seed: int = 0
    loaded: Decoder | None = None
    model: Decoder = field(init=False)
    backend: AttentionBackend = field(init=False)
    cache: PagedKVCache = field(init=False)
    runner: ModelRunner = field(init=False)

    def __post_init__(self) -> None:
        self.device = torch.device(self.place.device)
        if self.loaded is None:
            self._make_model()
        else:
            self.model, self.config = self.loaded, self.loaded.config
            self.num_layers = self.config.num_layers
        self.specs = self.specs or self.model.attention_specs
        self._make_backend()
        pages = self.num_pages or self.max_requests * -(-self.max_context_len // self.page_size)
        self.cache = make_cache(
            pages, self.page_size, max_requests=self.max_requests, max_context_len=self.max_context_len,
            num_layers=self.num_layers, kv_heads=self.config.num_kv_heads, head_dim=self.config.head_dim,
            dtype=self.place.dtype, device=self.place.device,
        )  # fmt: skip
        age(self.cache, self.seed)
        self.poison()
        self.runner = ModelRunner(self.model, self.backend, self.cache)

    def _make_model(self) -> None:
        self.config = ModelConfig(
            name="lab", num_layers=self.num_layers, hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=64,
            intermediate_size=96, vocab_size=VOCABULARY, max_context_len=self.max_context_len, rope_theta=1e4,
            mask=MaskConfig(self.mask.name, getattr(self.mask, "size", None)), softcap=self.softcap, sink=self.sink,
        )  # fmt: skip
        self.model = Decoder(self.config, dtype=self.place.dtype, device=self.device)
        randomise(self.model, self.seed)

    def _make_backend(self) -> None:
        assert self.specs is not None
        settings = BackendSettings(self.device, self.place.dtype, self.page_size, self.max_context_len)
        if self.make_backend is not None:
            self.backend = self.make_backend(settings, self.specs)
            return
        reasons = backends.reasons_against(self.place.backend, settings, self.specs)
        if reasons:
            pytest.skip(f"{self.place.backend}: {'; '.join(reasons)}")
        self.backend = backends.create(self.place.backend, settings, self.specs)

    def poison(self) -> None:
        """Nothing in the cache may be read from now on."""
        kv = self.cache.kv
        kv.poison()
        if self.place.backend.startswith("fa"):
            for buffer in (kv.k_LNKD, kv.v_LNKV):
                buffer[:, self.page_size :] = FINITE

    def decoder(
        self,
        *batch_sizes: int,
        mode: GraphMode | None = None,
        reserve_ahead: int = 5,
        bound: int | None = None,
    ) -> DecodeRunner:
        """A decode runner in the place's mode; what capturing it wrote to the sink page is NaN again."""
        decoder = DecodeRunner(
            self.runner,
            mode=mode or self.place.mode,
            batch_sizes=batch_sizes or (1, 2, 4),
            max_seq_len_k=bound or self.max_context_len,
            reserve_ahead=reserve_ahead,
        )
        self.cache.kv.poison([0])
        return decoder

    def prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[list[CachedRequest], Tensor]:
        """New requests, each extended in one pass; logits [B, X] of their last tokens."""
        requests = [self.cache.open() for _ in prompts]
        logits = self.runner.extend(requests, prompts)
        assert logits is not None
        return requests, logits

    @torch.inference_mode()
    def again(self, sequence: Sequence[int]) -> Tensor:
        """Logits [T, X] of the whole sequence in one extend pass, in a request that is closed again."""
        request = self.cache.open()
        batch = self.runner.prepare_extend([request], [sequence])
        self.backend.init_forward_metadata(batch, self.runner.req_to_token_RW)
        logits = self.model.compute_logits(self.runner.forward(batch))
        self.cache.close(request)
        return logits

    @torch.inference_mode()
    def oracle(self, sequence: Sequence[int], dtype: torch.dtype = torch.float64) -> Tensor:
        """Logits [T, X] of the whole sequence without engine, backend or cache."""
        assert self.specs is not None
        model = Decoder(self.config, dtype=dtype, device=self.device)
        model.load_state_dict(self.model.state_dict())
        ids_T = torch.tensor(sequence, device=self.device)
        return model.compute_logits(model(ids_T, WholeSequence(self.specs)))

    def check(self, sequence: Sequence[int], logits: Tensor, what: str = "logits") -> None:
        """`logits` [M, X] belong to the last M tokens of the sequence and are as good as the dtype allows."""
        count = logits.shape[0]
        exact, low = (self.oracle(sequence, dtype)[-count:] for dtype in (torch.float64, self.place.dtype))
        assert_accurate(logits, exact, low, softcap=self.softcap, what=what)


def randomise(model: Decoder, seed: int) -> None:
    """Weights so large that attention is far from uniform and decides the logits."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        norm = "_norm_" in name
        values = torch.randn(weight.shape, generator=generator) * (0.2 if norm else 0.25) + (
            1.0 if norm else 0.0
        )
        weight.copy_(values)


def prompts_of(*lens: int, seed: int = 0) -> list[list[int]]:
    """Random prompts without token 0, which padded entries hold."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, VOCABULARY, (n,), generator=generator).tolist() for n in lens]


@dataclass
class Decoded:
    """What greedy decoding gave: each request's whole sequence (prompt and new tokens), and [steps + 1, X] logits,
    those of the prompt's last token first."""

    sequences: list[list[int]]
    logits: list[Tensor]


def decode(
    decoder: DecodeRunner,
    requests: Sequence[CachedRequest],
    prompts: Sequence[Sequence[int]],
    first_BX: Tensor,
    steps: int,
    between: Callable[[int], object] = lambda step: None,
) -> Decoded:
    """Start where the prompts' prefill ended, with its logits; `between` runs before each step."""
    decoder.start(requests, first_BX.argmax(-1))
    logits, tokens = [first_BX.clone()], [first_BX.argmax(-1).tolist()]
    for step in range(steps):
        between(step)
        decoder.step()
        assert decoder.logits_BX is not None
        logits.append(decoder.logits_BX.clone())
        tokens.append(decoder.reader.pop())
    decoder.flush()
    sequences = [[*prompt, *new] for prompt, new in zip(prompts, zip(*tokens, strict=True), strict=True)]
    return Decoded(sequences, list(torch.stack(logits).unbind(1)))


class Session:
    """Requests that take turns in one decode runner; each keeps its tokens and logits."""

    def __init__(self, lab: Lab, lens: Sequence[int]) -> None:
        self.lab = lab
        self.sequences = prompts_of(*lens)
        self.requests, first = lab.prefill(self.sequences)
        self.logits = [[row] for row in first.clone()]

    def run(self, decoder: DecodeRunner, which: Sequence[int], steps: int) -> None:
        requests = [self.requests[i] for i in which]
        first = torch.stack([self.logits[i][-1] for i in which])
        result = decode(decoder, requests, [self.sequences[i] for i in which], first, steps)
        for n, i in enumerate(which):
            self.sequences[i] = result.sequences[n][:-1]  # the newest token is not fed yet
            self.logits[i] += result.logits[n][1:].unbind()
            assert self.requests[i].seq_len == len(self.sequences[i])

    def check(self) -> None:
        for sequence, logits in zip(self.sequences, self.logits, strict=True):
            self.lab.check(sequence, torch.stack(logits))
