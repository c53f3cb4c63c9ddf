"""What the tests share: requests in a used cache full of NaN, run through a backend, and the tolerance.

Legend: T query tokens, B requests, Q queries of one request, H query heads, K KV heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from fa_research import backends
from fa_research.attention.layer import PagedAttention
from fa_research.attention.reference import attention
from fa_research.backends import AttentionBackend, BackendSettings, CudaGraphState
from fa_research.batch import ForwardBatch, extend_batch
from fa_research.kv_cache import CachedRequest, PagedKVCache
from fa_research.masks import Causal, Mask
from fa_research.spec import AttentionSpec
from tests.caches import (
    age,
    decode_batch,
    examples,
    make_cache,
    no_synchronisation,
    slots_of,
    table_row,
    tokens,
)

__all__ = [
    "DEVICES",
    "FINITE_OWN_PAGES",
    "Scene",
    "age",
    "assert_accurate",
    "decode_batch",
    "examples",
    "make_cache",
    "make_spec",
    "no_synchronisation",
    "slots_of",
    "table_row",
    "tokens",
]

# Backends whose kernels may multiply what lies past a request's end in its own last page by an exact zero. For them
# that memory is large and finite, as the pool promises; every other slot that nothing wrote is NaN for them too.
FINITE_OWN_PAGES: frozenset[str] = frozenset({"fa2", "fa3", "fa4", "flex"})

DEVICES = (pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu))


def make_spec(
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 64,
    mask: Mask | None = None,
    softcap: float = 0.0,
    has_sink: bool = False,
) -> AttentionSpec:
    """A spec for `heads` = (query, KV). Its scale is not the usual 1 / sqrt(D): a kernel that assumes it fails."""
    scale = 1.4 * head_dim**-0.5
    return AttentionSpec(*heads, head_dim, head_dim, scale, softcap, mask or Causal(), has_sink=has_sink)


@dataclass
class Scene:
    """Requests in a used, poisoned cache with dense copies of their data: what a test runs and checks against.

    lens: (prefix, new) tokens per request. q, k and v are per request: q [new, H, D], k and v [prefix + new, K, D].
    Every slot that nothing wrote is NaN, page 0 among them.
    """

    spec: AttentionSpec
    lens: tuple[tuple[int, int], ...]
    page_size: int
    dtype: torch.dtype
    device: str = "cpu"
    decode: bool = False
    seed: int = 0
    slack: int = 7  # context limit beyond the longest request
    lowest_page: int = 1  # the requests' pages are at least this: the lower ones belong to nobody
    cache: PagedKVCache = field(init=False)
    requests: list[CachedRequest] = field(init=False)
    sinks: Tensor | None = field(init=False, default=None)
    layer_id: int = 1  # of two, so that a forgotten layer offset shows

    def __post_init__(self) -> None:
        spec, totals = self.spec, [prefix + new for prefix, new in self.lens]
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(self.device, self.dtype)

        self.q = [normal(new, spec.num_heads, spec.head_dim) for _, new in self.lens]
        self.k = [normal(total, spec.num_kv_heads, spec.head_dim) for total in totals]
        self.v = [normal(total, spec.num_kv_heads, spec.v_head_dim) for total in totals]
        if spec.has_sink:
            self.sinks = torch.randn(spec.num_heads, generator=generator).to(self.device, self.dtype) + 1.0
        self._fill_cache(totals)

    def _fill_cache(self, totals: list[int]) -> None:
        spec, pages = self.spec, sum(-(-total // self.page_size) for total in totals) + 5
        self.cache = make_cache(
            self.lowest_page - 1 + pages,
            self.page_size,
            max_requests=len(totals) + 3,
            max_context_len=max(totals) + self.slack,
            num_layers=2,
            kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            dtype=self.dtype,
            device=self.device,
            check_invariants=self.lowest_page == 1,
        )
        age(self.cache, self.seed)
        if self.lowest_page > 1:
            every_page = self.cache.allocator.alloc(self.cache.allocator.num_pages)
            self.cache.allocator.free(sorted(every_page)[-pages:])
            self.cache.allocator.churn(self.seed)
        self.requests = [self.cache.open() for _ in totals]
        self.cache.extend(self.requests, [prefix for prefix, _ in self.lens])
        self.cache.extend(self.requests, [new for _, new in self.lens])
        self.cache.kv.poison()
        for i, (prefix, _) in enumerate(self.lens):
            slots = torch.tensor(
                slots_of(self.cache, self.requests[i], prefix), dtype=torch.int64, device=self.device
            )
            if prefix:
                self.cache.kv.write(self.layer_id, self.k[i][:prefix], self.v[i][:prefix], slots)

    @property
    def totals(self) -> list[int]:
        return [prefix + new for prefix, new in self.lens]

    @property
    def table(self) -> Tensor:
        return self.cache.req_to_token.req_to_token

    @property
    def specs(self) -> tuple[AttentionSpec, AttentionSpec]:
        """Two layers: plain causal attention, then the spec under test."""
        s = self.spec
        return AttentionSpec(s.num_heads, s.num_kv_heads, s.head_dim, s.v_head_dim, s.scale), s

    def backend(self, name: str, **changes: object) -> AttentionBackend:
        """Backend `name` for these requests (`changes` to its settings); skips with its reasons where it cannot."""
        asked = self.settings(**changes)
        reasons = backends.reasons_against(name, asked, self.specs)
        if reasons:
            pytest.skip(f"{name}: {'; '.join(reasons)}")
        if name in FINITE_OWN_PAGES:
            self._make_own_pages_finite()
        return backends.create(name, asked, self.specs)

    def _make_own_pages_finite(self) -> None:
        own = torch.tensor([page for request in self.requests for page in request.pages], device=self.device)
        for pool in (self.cache.kv.k_paged(self.layer_id), self.cache.kv.v_paged(self.layer_id)):
            pool[own] = pool[own].nan_to_num(nan=3.0e4)

    def settings(self, **changes: object) -> BackendSettings:
        limit = self.cache.req_to_token.max_context_len
        base = {"device": torch.device(self.device), "dtype": self.dtype, "page_size": self.page_size}
        return BackendSettings(**base, max_context_len=limit, **changes)  # type: ignore[arg-type]

    def batch(self, which: Sequence[int] | None = None, padding: int = 0) -> ForwardBatch:
        """The batch of the requests `which` (None: all); a decode batch may be padded as a captured one is."""
        which = range(len(self.lens)) if which is None else which
        rows = [self.requests[i].row for i in which] + [0] * padding
        prefixes, new = [self.lens[i][0] for i in which] + [1] * padding, [self.lens[i][1] for i in which]
        if self.decode:
            batch = decode_batch(self.table, rows, prefixes, self.cache.req_to_token.max_context_len)
            lens = (prefix + 1 if row else 1 for row, prefix in zip(rows, prefixes, strict=True))
            batch.seq_lens_cpu = tuple(lens)  # for backends that plan on the host
            return batch
        assert not padding
        return extend_batch(self.table, rows, prefixes, tokens(new))

    def qkv(self, which: Sequence[int] | None = None, padding: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Ragged q, k, v of the new tokens, as views of one fused projection: rows are far apart. Padding is NaN."""
        which = range(len(self.lens)) if which is None else which
        parts = (
            torch.cat([self.q[i] for i in which]),
            torch.cat([self.k[i][self.lens[i][0] :] for i in which]),
            torch.cat([self.v[i][self.lens[i][0] :] for i in which]),
        )
        fused = torch.cat([part.flatten(1) for part in parts], dim=1)
        fused = torch.nn.functional.pad(fused, (0, 0, 0, padding), value=torch.nan)
        widths = [part.shape[1] * part.shape[2] for part in parts]
        q, k, v = (
            x.unflatten(1, part.shape[1:]) for x, part in zip(fused.split(widths, dim=1), parts, strict=True)
        )
        return q, k, v

    def run(
        self,
        backend: AttentionBackend,
        which: Sequence[int] | None = None,
        *,
        padding: int = 0,
        static: CudaGraphState | None = None,
    ) -> list[Tensor]:
        """Write and read through the backend; the output of each request. static: in these buffers of captured
        steps."""
        which = range(len(self.lens)) if which is None else which
        batch = self.batch(which, padding)
        if static is not None:
            backend.init_forward_metadata_capture_cuda_graph(batch, self.table, static)
        else:
            backend.init_forward_metadata(batch, self.table)
        attend = PagedAttention(backend, self.cache.kv, batch, backend.lowerings)
        out_THV = attend(self.layer_id, *self.qkv(which, padding), rope=None, sinks_H=self.sinks)
        count = out_THV.shape[0] - padding
        return list(out_THV[:count].split([self.lens[i][1] for i in which]))

    def lse(self, backend: AttentionBackend) -> list[Tensor]:
        """LSE of each request, from what `run` has written."""
        lowering = backend.lowerings[self.layer_id]
        caches = (self.cache.kv.k(self.layer_id), self.cache.kv.v(self.layer_id))
        sinks = None if lowering.sink_epilogue else self.sinks
        q_THD = self.qkv()[0]
        _, lse_TH = backend.forward(q_THD, *caches, lowering, sinks_H=sinks, return_lse=True)
        assert lse_TH is not None and lse_TH.dtype == torch.float32
        return list(lse_TH.split([new for _, new in self.lens]))

    def reference(self, i: int, compute_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Request i by the definition, on the dense data."""
        q_pos = torch.arange(*(self.lens[i][0], self.totals[i]), device=self.device)
        data = (self.q[i], self.k[i], self.v[i], q_pos, self.spec)
        return attention(*data, sinks_H=self.sinks, compute_dtype=compute_dtype)

    def check(self, backend: AttentionBackend, *, lse: bool = True) -> None:
        """Output (and LSE) of every request against float64."""
        outs = self.run(backend)
        self.check_outputs(outs, range(len(self.lens)))
        if lse:
            for i, lse_QH in enumerate(self.lse(backend)):
                exact, low = self.reference(i, torch.float64)[1], self.reference(i, self.dtype)[1]
                assert_accurate(lse_QH, exact, low, softcap=self.spec.softcap, what=f"lse of request {i}")

    def check_outputs(self, outs: Sequence[Tensor], which: Sequence[int]) -> None:
        for i, out in zip(which, outs, strict=True):
            exact, low = self.reference(i, torch.float64)[0], self.reference(i, self.dtype)[0]
            assert out.dtype == self.dtype
            assert_accurate(out, exact, low, softcap=self.spec.softcap, what=f"out of request {i}")


def assert_accurate(
    actual: Tensor, exact: Tensor, low: Tensor, *, softcap: float = 0.0, what: str = "out"
) -> None:
    """The tolerance of flash-attention's own tests: the error against float64 is at most twice that of the same
    computation in the low precision (with a softcap, whose tanh kernels approximate, three times), plus a constant."""
    exact = exact.double()
    assert actual.shape == exact.shape
    error = (actual.double() - exact).abs().max().item()
    small = torch.finfo(low.dtype).eps * exact.abs().max().item() + 2e-6
    bound = (3 if softcap else 2) * (low.double() - exact).abs().max().item() + small
    assert error <= bound, f"{what}: error {error:.3g} is above {bound:.3g}"  # NaN fails too
