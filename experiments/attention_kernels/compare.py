"""Attention kernels side by side in one process: the bare FA3 call, FA3 through the layer, and our Triton kernels.

Run on a Hopper GPU: python experiments/attention_kernels/compare.py OUT_FOLDER [decode|extend]
Each variant is a CUDA graph of the same calls over several layers' caches, so that L2 is cold; variants take turns in
random order, and every variant is checked against the float64 oracle before it is timed.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from fa_research.attention.layer import PagedAttention
from fa_research.attention.reference import paged_attention
from fa_research.backends import AttentionBackend, BackendSettings, create, reasons_against
from fa_research.batch import ForwardBatch, ForwardMode, extend_batch
from fa_research.kv_cache import PagedAllocator, PagedKVCache, ReqToTokenPool, TokenToKVPool
from fa_research.masks import Causal
from fa_research.measure.numerics import judge
from fa_research.measure.work import attention_work
from fa_research.spec import AttentionSpec
from fa_research.tracking import Row, RowWriter, Status, environment
from fa_research.workloads.base import Pass

# (requests, tokens in the cache after the pass, new tokens each)
DECODE = [
    (1, 4096),
    (16, 4096),
    (64, 4096),
    (128, 4096),
    (128, 8192),
    (16, 16384),
    (16, 65536),
    (8, 65536),
    (1, 131072),
]
EXTEND = [(1, 8192, 8192), (1, 32768, 32768), (4, 18432, 2048), (4, 4096, 4096)]
DEVICE, DTYPE = torch.device("cuda"), torch.bfloat16
COLD_BYTES = 256 << 20
ROUNDS = 25
Variant = tuple[str, Callable[[], object], dict[str, float | bool]]  # name, what runs, its check


def spec_of(head_dim: int) -> AttentionSpec:
    return AttentionSpec(32, 8, head_dim, head_dim, head_dim**-0.5, mask=Causal())


def build_cache(requests: int, length: int, page_size: int, head_dim: int) -> PagedKVCache:
    """A churned cache of as many layers as make the keys and values outgrow L2, filled with random numbers."""
    pages = requests * -(-length // page_size)
    layer_bytes = pages * page_size * 8 * head_dim * 2 * DTYPE.itemsize
    layers = max(1, min(16, -(-COLD_BYTES // layer_bytes)))
    pool = TokenToKVPool(
        pages,
        page_size,
        num_layers=layers,
        num_kv_heads=8,
        head_dim=head_dim,
        v_head_dim=head_dim,
        dtype=DTYPE,
        device=DEVICE,
    )
    pool.fill_random(0)
    allocator = PagedAllocator(pages, page_size)
    allocator.churn(0)
    table = ReqToTokenPool(requests, length, page_size=page_size, device=DEVICE)
    return PagedKVCache(table, allocator, pool)


def build_batch(cache: PagedKVCache, requests: int, length: int, new: int) -> ForwardBatch:
    opened = [cache.open() for _ in range(requests)]
    cache.extend(opened, [length] * requests)
    rows = [request.row for request in opened]
    batch = extend_batch(
        cache.req_to_token.req_to_token, rows, [length - new] * requests, [[0] * new] * requests
    )
    if new == 1:
        batch.mode, batch.extend_seq_lens_B = ForwardMode.DECODE, None
    return batch


def bare_fa3(
    backend: AttentionBackend, cache: PagedKVCache, q: torch.Tensor, scheduled: bool
) -> Callable[[], object]:
    """The provider's own function, called as its documentation says; the split schedule per call or given."""
    from vllm.vllm_flash_attn.flash_attn_interface import flash_attn_varlen_func, get_scheduler_metadata

    metadata = backend.forward_metadata
    assert metadata is not None
    lens, cu_q, table = metadata.cache_seqlens_int32_B, metadata.cu_seqlens_q_B1, metadata.page_table_BP
    max_q, max_k, dim = metadata.max_seq_len_q, metadata.max_seq_len_k, q.shape[-1]
    schedule = None
    if scheduled:
        schedule = get_scheduler_metadata(
            len(lens),
            max_q,
            max_k,
            32,
            8,
            dim,
            lens,
            cu_seqlens_q=cu_q,
            page_size=metadata.page_size,
            causal=True,
        )

    def run() -> None:
        for layer in range(cache.kv.num_layers):
            flash_attn_varlen_func(
                q, cache.kv.k_paged(layer), cache.kv.v_paged(layer), max_q, cu_q, max_k, seqused_k=lens, causal=True,
                block_table=table, scheduler_metadata=schedule, fa_version=3,
            )  # fmt: skip

    return run


def variants(cache: PagedKVCache, batch: ForwardBatch, q: torch.Tensor) -> list[Variant]:
    dim, layers = q.shape[-1], cache.kv.num_layers
    specs = [spec_of(dim)] * layers
    settings = BackendSettings(DEVICE, DTYPE, cache.page_size, 1 << 20)
    found: list[Variant] = []
    for name in ("fa3", "fa2", "triton"):
        if reasons_against(name, settings, specs):
            continue
        backend = create(name, settings, specs)
        backend.init_forward_metadata(batch, cache.req_to_token.req_to_token)
        attend = PagedAttention(backend, cache.kv, batch, backend.lowerings)
        checks = check(attend, cache, batch, q)
        run = lambda attend=attend: [attend.read(layer, q) for layer in range(layers)]  # noqa: E731
        found.append((name, run, checks))
        if name == "fa3" and backend.provider == "vllm.vllm_flash_attn":
            found.append(("fa3_bare", bare_fa3(backend, cache, q, scheduled=False), {}))
            found.append(("fa3_bare_scheduled", bare_fa3(backend, cache, q, scheduled=True), {}))
    return found


def check(
    attend: PagedAttention, cache: PagedKVCache, batch: ForwardBatch, q: torch.Tensor
) -> dict[str, float | bool]:
    """One request's outputs (its last 64 rows) against float64, as columns; raises AssertionError."""
    i = batch.batch_size - 1
    seq_len, extend_len = batch.seq_lens_cpu[i], min(64, batch.max_seq_len_q)
    out = attend.read(0, q)[-extend_len:]
    table = (
        cache.req_to_token.req_to_token[batch.req_pool_indices_B[i : i + 1], :: cache.page_size]
        // cache.page_size
    )
    arguments = (
        q[-extend_len:],
        cache.kv.k(0),
        cache.kv.v(0),
        table,
        [seq_len],
        [extend_len],
        cache.page_size,
    )
    baseline, reference = (
        paged_attention(*arguments, spec_of(q.shape[-1]), compute_dtype=dtype)[0]
        for dtype in (DTYPE, torch.float64)
    )
    verdict = judge([(out, baseline, reference)])
    assert verdict.passed, verdict
    return verdict.checks("attention")


def capture(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def interleave(graphs: dict[str, torch.cuda.CUDAGraph], layers: int) -> dict[str, list[float]]:
    """Microseconds per layer of each variant, in rounds of random order."""
    flush = torch.empty(COLD_BYTES, dtype=torch.int8, device=DEVICE)
    events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
    order, rng = list(graphs), random.Random(0)
    for _ in range(ROUNDS):
        rng.shuffle(order)
        for name in order:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            start.record()
            graphs[name].replay()
            end.record()
            events.append((name, start, end))
    torch.cuda.synchronize()
    samples: dict[str, list[float]] = {name: [] for name in graphs}
    for name, start, end in events:
        samples[name].append(start.elapsed_time(end) * 1e3 / layers)
    return {name: values[2:] for name, values in samples.items()}


def run_cell(requests: int, length: int, new: int, page_size: int, head_dim: int, writer: RowWriter) -> None:
    cache = build_cache(requests, length, page_size, head_dim)
    batch = build_batch(cache, requests, length, new)
    q = torch.randn(requests * new, 32, head_dim, dtype=DTYPE, device=DEVICE)
    with torch.inference_mode():
        found = variants(cache, batch, q)
        samples = interleave({name: capture(run) for name, run, _ in found}, cache.kv.num_layers)
    checks = {name: columns for name, _, columns in found}
    lens = [length] * requests
    work = attention_work(
        Pass([], lens, [new] * requests, requests * new, batch.mode), [spec_of(head_dim)], DTYPE.itemsize
    )
    config = {
        "requests": requests,
        "length": length,
        "new": new,
        "page_size": page_size,
        "head_dim": head_dim,
        "dtype": "bfloat16",
    }
    line = f"{requests:4d} x {length:6d} new {new:5d} page {page_size:3d} dim {head_dim:3d} "
    reference = median(samples.get("fa3", [float("nan")]))
    for name, values in samples.items():
        us = median(values)
        metrics = {
            "attention_us": us,
            "samples_us": [round(value, 2) for value in values],
            "GB_per_s": work.bytes / us / 1e3,
            "TFLOP_per_s": work.flops / us / 1e6,
            "speed_against_fa3": reference / us,
        }
        writer.write(
            Row(Status.ok, config | {"variant": name}, "", metrics, checks[name], environment=environment())
        )
        rate = metrics["TFLOP_per_s"] if new > 1 else metrics["GB_per_s"]
        line += f"| {name} {us:8.1f} us {rate:6.0f} {reference / us:5.2f} "
    print(line, flush=True)


def main(folder: Path, kinds: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with RowWriter(folder / "rows.jsonl") as writer:
        cells = [(b, n, 1, p, 128) for b, n in DECODE for p in (1, 16, 128)] if "decode" in kinds else []
        cells += [(64, 4096, 1, 16, dim) for dim in (64, 256)] if "decode" in kinds else []
        cells += [(*shape, p, 128) for shape in EXTEND for p in (1, 16, 128)] if "extend" in kinds else []
        cells += [(1, 8192, 8192, 16, dim) for dim in (64, 256)] if "extend" in kinds else []
        for cell in cells:
            run_cell(*cell, writer)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] or ["decode", "extend"])
