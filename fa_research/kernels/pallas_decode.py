"""Decode attention over a paged cache in Pallas (Triton lowering): one token a request, keys split over programs.

Shape suffixes: B requests, H query heads, K KV heads, G query heads of a KV head (padded to 16, as matrix products
want), D head dim, V value head dim (= D), R rows of the pool (one a slot and layer), P pages of a request, C cuts of
the keys, N keys of a tile.

Flash-decoding (Dao et al. 2023) with the query heads of a KV head packed into one product. A program takes one request,
one KV head and one cut of that request's own keys; cuts are joined by their LSE in XLA. The grid depends on shapes.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from fa_research.kernels.jax_paged import of_any_rank

LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453
LOWEST = -1.0e30  # a running maximum that starts at -inf would make NaN of -inf - (-inf)
PROGRAMS = 512  # enough for every multiprocessor of a large GPU to have a few


@dataclass(frozen=True)
class Config:
    """How the kernel is launched: keys a tile, warps, pipeline stages, cuts of a request (0: by the batch). The default
    was the fastest of those measured on an H200 (experiments/jax_decode)."""

    block_n: int = 64
    num_warps: int = 4
    num_stages: int = 2
    cuts: int = 0


def _kernel(row_ref, q_ref, k_ref, v_ref, table_ref, lens_ref, out_ref, lse_ref, *, page_size, scale, softcap,
            window, chunk, cuts, block_n):  # fmt: skip
    request, head, cut = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    length, first_row = lens_ref[request], row_ref[0]
    lowest = jnp.int32(0)
    if window:
        lowest = jnp.maximum(lowest, length - window)
    if chunk:
        lowest = jnp.maximum(lowest, jnp.maximum(length - 1, 0) // chunk * chunk)
    first_tile = lowest // block_n
    share = _ceil_div(_ceil_div(length, block_n) - first_tile, cuts)
    begin = (first_tile + cut * share) * block_n
    end = jnp.minimum(begin + share * block_n, length)
    group, head_dim = q_ref.shape[2:]
    offsets, columns, tile = (
        lax.iota(jnp.int32, block_n),
        lax.iota(jnp.int32, head_dim),
        (block_n, head_dim),
    )
    q = q_ref[request, head]

    def pages_at(start):
        keys = start + offsets
        return plgpu.load(table_ref.at[request, keys // page_size], mask=keys < end, other=0)

    def attend(i, state):
        peak, norm, acc, pages = state
        start = begin + i * block_n
        keys = start + offsets
        live = (keys >= lowest) & (keys < end)
        rows = first_row + pages * page_size + keys % page_size
        # Every index is an array or a number: the interpreter masks no slices.
        where = (jnp.broadcast_to(rows[:, None], tile), head, jnp.broadcast_to(columns[None, :], tile))
        in_tile = jnp.broadcast_to(live[:, None], tile)
        k = plgpu.load(k_ref.at[where], mask=in_tile, other=0)
        v = plgpu.load(v_ref.at[where], mask=in_tile, other=0)
        pages = pages_at(start + block_n)  # one tile ahead: K and V then wait for nothing
        scores = plgpu.dot(q, k.T) * (scale * LOG2E)
        if softcap:
            # tanh(x) = 1 - 2 / (1 + exp(2x)), right at both ends
            doubled = jnp.exp2(scores * (2.0 / softcap))
            scores = (softcap * LOG2E) * (1.0 - 2.0 / (1.0 + doubled))
        scores = jnp.where(live[None, :], scores, -jnp.inf)
        new_peak = jnp.maximum(peak, scores.max(axis=1))
        weights, shrink = jnp.exp2(scores - new_peak[:, None]), jnp.exp2(peak - new_peak)
        acc = acc * shrink[:, None] + plgpu.dot(weights.astype(v.dtype), v)
        return new_peak, norm * shrink + weights.sum(axis=1), acc, pages

    empty = (
        jnp.full((group,), LOWEST, jnp.float32),
        jnp.zeros((group,), jnp.float32),
        jnp.zeros((group, head_dim), jnp.float32),
        pages_at(begin),
    )
    tiles = _ceil_div(jnp.maximum(end - begin, 0), block_n)
    peak, norm, acc, _ = lax.fori_loop(jnp.int32(0), tiles, attend, empty)
    seen = norm > 0
    norm = jnp.where(seen, norm, 1.0)
    out_ref[request, head, cut] = (acc / norm[:, None]).astype(out_ref.dtype)
    lse_ref[request, head, cut] = jnp.where(seen, (peak + jnp.log2(norm)) * LN2, -jnp.inf)


def _ceil_div(x, n: int):
    """In x's type; `pl.cdiv` takes n to be int64 where JAX has 64-bit types."""
    return (x + (n - 1)) // n


@functools.partial(
    jax.jit, static_argnames=("page_size", "scale", "softcap", "window", "chunk", "config", "interpret")
)
@of_any_rank
def paged_decode(
    q_BHD,
    k_RKD,
    v_RKD,
    first_row,
    page_table_BP,
    cache_seqlens_B,
    sinks_H=None,
    *,
    page_size: int,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
    chunk: int = 0,
    config: Config = Config(),  # noqa: B008 (frozen)
    interpret: bool = False,
):
    """Attention of each request's last token to its keys, the token's own among them.

    Args:
        q_BHD: queries, float16 or bfloat16 (float32 with `interpret` only). D is a power of two, 16 at least.
        k_RKD, v_RKD: pools; slot s is row `first_row` + s. Rows that no request owns are not loaded.
        page_table_BP, cache_seqlens_B: int32; a length of 0 gives zeros and an LSE of -inf.
        sinks_H: one more logit a head in the denominator. window, chunk: as in `masks.Band`, 0 for none.
        interpret: run as plain JAX, on any device, slowly.

    Returns:
        out_BHD in q's dtype, and float32 LSE_BH (natural, without the sink).
    """
    batch, heads, head_dim = q_BHD.shape
    kv_heads = k_RKD.shape[1]
    group = heads // kv_heads
    padded = max(16, pl.next_power_of_2(group))
    q_BKGD = jnp.pad(
        q_BHD.reshape(batch, kv_heads, group, head_dim), ((0, 0), (0, 0), (0, padded - group), (0, 0))
    )
    most = page_table_BP.shape[1] * page_size
    cuts = config.cuts or max(1, min(PROGRAMS // (batch * kv_heads), most // (2 * config.block_n)))
    kernel = functools.partial(
        _kernel, page_size=page_size, scale=scale, softcap=softcap, window=window, chunk=chunk, cuts=cuts,
        block_n=config.block_n,
    )  # fmt: skip
    shape = (batch, kv_heads, cuts, padded)
    out, lse = pl.pallas_call(
        kernel,
        grid=(batch, kv_heads, cuts),
        out_shape=(
            jax.ShapeDtypeStruct((*shape, head_dim), jnp.float32 if cuts > 1 else q_BHD.dtype),
            jax.ShapeDtypeStruct(shape, jnp.float32),
        ),
        compiler_params=plgpu.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        interpret=interpret,
        name="paged_decode",
    )(jnp.asarray(first_row, jnp.int32).reshape(1), q_BKGD, k_RKD, v_RKD, page_table_BP, cache_seqlens_B)
    out, lse = out[..., :group, :], lse[..., :group]
    if cuts > 1:
        out, lse = _join(out, lse)
    else:
        out, lse = out[:, :, 0], lse[:, :, 0]
    if sinks_H is not None:
        out = out * jax.nn.sigmoid(lse - sinks_H.reshape(kv_heads, group).astype(jnp.float32))[..., None]
    return out.reshape(batch, heads, head_dim).astype(q_BHD.dtype), lse.reshape(batch, heads)


def _join(out_BKCGD, lse_BKCG):
    """The cuts of a request as one result."""
    peak = jnp.maximum(lse_BKCG.max(axis=2, keepdims=True), LOWEST)
    weights = jnp.exp(lse_BKCG - peak)
    norm = weights.sum(axis=2)
    seen = norm > 0
    norm = jnp.where(seen, norm, 1.0)
    out = (out_BKCGD * weights[..., None]).sum(axis=2) / norm[..., None]
    return out, jnp.where(seen, peak[:, :, 0] + jnp.log(norm), -jnp.inf)
