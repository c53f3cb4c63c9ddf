"""Paged attention as XLA computes it: ragged queries over a paged KV cache, in `jax.jit`.

Shape suffixes: T query tokens, B requests, H query heads, K KV heads, G = H / K, D head dim, V value head dim, R rows
of the pool (one a slot and layer), P pages of a request, X tiles of queries, Q queries of a tile, N keys of a step.

Queries are cut into tiles that belong to one request each, so a long prefill beside decodes pads no other request.
Every tile walks its own keys in steps of N with a running softmax (FlashAttention, Dao et al. 2022), beginning at the
first key that the mask's band lets its first query see. Which keys count is said by the mask's own predicate. All
shapes are static: one program serves a bucket of tokens, requests and pages.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

LOWEST = -1.0e30  # a running maximum that starts at -inf would make NaN of -inf - (-inf)
STEP_BYTES = 1 << 26  # keys, values and scores of one step take about so much
HIGHEST = lax.Precision.HIGHEST  # float32 stays float32 on GPUs, not TF32


def of_any_rank(function):
    """`function` with broadcasting between arrays of different ranks, whatever `jax_numpy_rank_promotion` is."""

    @functools.wraps(function)
    def call(*args, **options):
        with jax.numpy_rank_promotion("allow"):
            return function(*args, **options)

    return call


@functools.partial(jax.jit, static_argnames=("mask", "page_size", "scale", "softcap", "tile", "step"))
@of_any_rank
def paged_attention(
    q_THD,
    k_RKD,
    v_RKV,
    first_row,
    page_table_BP,
    cache_seqlens_B,
    cu_seqlens_q_B1,
    sinks_H=None,
    *,
    mask,
    page_size: int,
    scale: float,
    softcap: float = 0.0,
    tile: int = 1,
    step: int | None = None,
):
    """Attention of each request's last tokens to all its keys, the tokens' own among them.

    Args:
        q_THD: queries, request after request; tokens from the last cumulative length on are padding.
        k_RKD, v_RKV: pools; slot s is row `first_row` + s. What no request owns may hold NaN: it is masked when read.
        page_table_BP, cache_seqlens_B, cu_seqlens_q_B1: int32, as in FlashAttentionMetadata. Entries past a request's
            pages are not used.
        sinks_H: float32, one more logit a head in the denominator.
        mask: hashable, with `allows(q_pos, k_pos)` and `band()`.
        tile: queries a tile; 1 where no request has more than one. step: keys a step (None: chosen by size).

    Returns:
        out_THV in q's dtype (0 where no key is seen), and LSE_TH in float32 (natural, without the sink).
    """
    tokens, heads, head_dim = q_THD.shape
    batch, kv_heads, v_dim = cache_seqlens_B.shape[0], k_RKD.shape[1], v_RKV.shape[2]
    group = heads // kv_heads
    compute = jnp.promote_types(q_THD.dtype, jnp.float32)
    tiles = tokens if tile == 1 else tokens // tile + batch

    # Which request, and which of its queries.
    q_lens_B = jnp.diff(cu_seqlens_q_B1)
    ends_B = jnp.cumsum(-(-q_lens_B // tile))
    request_X = jnp.minimum(jnp.searchsorted(ends_B, jnp.arange(tiles), side="right"), batch - 1)
    begins_B = ends_B - -(-q_lens_B // tile)
    within_X = jnp.arange(tiles) - begins_B[request_X]
    token_XQ = (cu_seqlens_q_B1[request_X] + within_X * tile)[:, None] + jnp.arange(tile)
    length_X = cache_seqlens_B[request_X]
    position_XQ = length_X[:, None] - (cu_seqlens_q_B1[request_X + 1][:, None] - token_XQ)
    q_XQKGD = q_THD[jnp.minimum(token_XQ, tokens - 1)].reshape(tiles, tile, kv_heads, group, head_dim)

    # Which keys: the band bounds them, the predicate decides.
    most = page_table_BP.shape[1] * page_size
    start_X, span = _interval(mask.band(), jnp.maximum(position_XQ[:, 0], 0), tile, most)
    step = step or _step(tiles, tile, heads, kv_heads * (head_dim + v_dim) * k_RKD.dtype.itemsize, span)

    def attend(i, state):
        peak, norm, acc = state
        key_XN = start_X[:, None] + i * step + jnp.arange(step)
        owned_XN = key_XN < length_X[:, None]
        column_XN = jnp.minimum(key_XN // page_size, page_table_BP.shape[1] - 1)
        slot_XN = page_table_BP[request_X[:, None], column_XN] * page_size + key_XN % page_size
        row_XN = first_row + jnp.where(owned_XN, slot_XN, 0)
        k = jnp.where(owned_XN[..., None, None], k_RKD[row_XN], 0)
        v = jnp.where(owned_XN[..., None, None], v_RKV[row_XN], 0)
        scores = scale * jnp.einsum(
            "xqkgd,xnkd->xkgqn", q_XQKGD, k, precision=HIGHEST, preferred_element_type=compute
        )
        if softcap:
            scores = softcap * jnp.tanh(scores / softcap)
        seen = mask.allows(position_XQ[:, :, None], key_XN[:, None, :]) & owned_XN[:, None, :]
        scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
        new_peak = jnp.maximum(peak, scores.max(-1))
        shrink, weights = jnp.exp(peak - new_peak), jnp.exp(scores - new_peak[..., None])
        summed = jnp.einsum(
            "xkgqn,xnkv->xkgqv", weights.astype(v.dtype), v, precision=HIGHEST, preferred_element_type=compute
        )
        return new_peak, norm * shrink + weights.sum(-1), acc * shrink[..., None] + summed

    shape = (tiles, kv_heads, group, tile)
    empty = (jnp.full(shape, LOWEST, compute), jnp.zeros(shape, compute), jnp.zeros((*shape, v_dim), compute))
    peak, norm, acc = lax.fori_loop(0, -(-span // step), attend, empty)
    lse = jnp.where(norm > 0, peak + jnp.log(norm), -jnp.inf)
    out = acc / jnp.where(norm > 0, norm, 1)[..., None]
    if sinks_H is not None:
        keep = jax.nn.sigmoid(lse - sinks_H.reshape(kv_heads, group, 1).astype(compute))
        out = out * keep[..., None]

    # Back from tiles to tokens.
    token_T = jnp.arange(tokens)
    owner_T = jnp.minimum(jnp.searchsorted(cu_seqlens_q_B1[1:], token_T, side="right"), batch - 1)
    offset_T = token_T - cu_seqlens_q_B1[owner_T]
    tile_T, query_T = begins_B[owner_T] + offset_T // tile, offset_T % tile
    out_THV = out.transpose(0, 3, 1, 2, 4)[tile_T, query_T].reshape(tokens, heads, v_dim).astype(q_THD.dtype)
    return out_THV, lse.transpose(0, 3, 1, 2)[tile_T, query_T].reshape(tokens, heads).astype(jnp.float32)


def _interval(band, first_position_X, tile: int, most: int):
    """First key that each tile may see, and the most keys from there on."""
    start_X = jnp.zeros_like(first_position_X)
    if band is None:
        return start_X, most
    span = most
    if band.window:
        start_X = jnp.maximum(start_X, first_position_X - (band.window - 1))
        span = min(span, band.window + tile - 1) if band.causal else span
    if band.chunk:
        start_X = jnp.maximum(start_X, first_position_X // band.chunk * band.chunk)
        span = min(span, band.chunk + tile - 1) if band.causal else span
    return start_X, span


def _step(tiles: int, tile: int, heads: int, key_bytes: int, span: int) -> int:
    """Keys a step: a power of two, as many as STEP_BYTES hold, at most 1024 and not far beyond what there is."""
    wanted = STEP_BYTES // (tiles * max(key_bytes, heads * tile * 4))
    step = 16
    while step < min(wanted, span, 1024):
        step *= 2
    return step
