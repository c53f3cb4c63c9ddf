"""The small operations of a forward pass, each in two forms: a Triton kernel, and plain torch.

CUDA tensors of float16, bfloat16 and float32 (and the integer work on them) take the kernels; everything
else, the CPU and float64 among it, takes torch. The choice is by the tensor alone, the results agree within
rounding, and Triton is imported when the first kernel runs. Nothing here reads a device value on the host.

Shapes: T tokens, E hidden size, F intermediate size, H query heads, K KV heads, D head dim, V value head dim,
N slots, X positions of the table, B requests, R rows and W columns of ``req_to_token``, P pages. Shape and
dtype contracts are those of the kernels: norm.py, activation.py, rope_kv.py, fill_metadata.py, page_indices.py,
sampling.py.
"""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from fa_research.kernels import sampling_torch

_KERNEL_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32})


@cache
def _kernels() -> SimpleNamespace:
    from fa_research.kernels import activation, fill_metadata, norm, page_indices, rope_kv, sampling

    return SimpleNamespace(
        rms_norm=norm.rms_norm,
        add_rms_norm=norm.add_rms_norm,
        glu=activation.glu,
        softcap=activation.softcap,
        write_kv=rope_kv.write_kv,
        rope_write_kv=rope_kv.rope_write_kv,
        fill_metadata=fill_metadata.fill_metadata,
        advance_decode=fill_metadata.advance_decode,
        compact_pages=page_indices.compact_pages,
        argmax=sampling.argmax,
        sample=sampling.sample,
    )


def _use_kernel(x: Tensor) -> bool:
    return x.is_cuda and x.dtype in _KERNEL_DTYPES


def _accumulate(x: Tensor) -> Tensor:
    """At least float32, as the kernels compute."""
    return x if x.dtype == torch.float64 else x.float()


def rms_norm(x_TE: Tensor, weight_E: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    """RMSNorm over the last dimension of [T, E] or [T, heads, E]; ``out`` may be the input."""
    if _use_kernel(x_TE):
        return _kernels().rms_norm(x_TE, weight_E, eps, out)
    x = _accumulate(x_TE)
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * _accumulate(weight_E)
    return normed.to(x_TE.dtype) if out is None else out.copy_(normed)


def add_rms_norm(x_TE: Tensor, residual_TE: Tensor, weight_E: Tensor, eps: float) -> Tensor:
    """``residual += x`` in place, then a new tensor with the RMSNorm of the residual."""
    if _use_kernel(x_TE):
        return _kernels().add_rms_norm(x_TE, residual_TE, weight_E, eps)
    residual_TE.add_(x_TE)
    return rms_norm(residual_TE, weight_E, eps).to(x_TE.dtype)


def glu(gate_up_T2F: Tensor, activation: str, out: Tensor | None = None) -> Tensor:
    """``act(gate) * up`` of gate | up: `silu`, `gelu_tanh` or `swiglu_clamped` (gpt-oss)."""
    if _use_kernel(gate_up_T2F):
        return _kernels().glu(gate_up_T2F, activation, out)
    gate, up = _accumulate(gate_up_T2F).chunk(2, dim=-1)
    if activation == "swiglu_clamped":
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        result = gate * torch.sigmoid(1.702 * gate) * (up + 1)
    elif activation == "gelu_tanh":
        result = F.gelu(gate, approximate="tanh") * up
    else:
        assert activation == "silu", activation
        result = F.silu(gate) * up
    return result.to(gate_up_T2F.dtype) if out is None else out.copy_(result)


def softcap(x: Tensor, cap: float) -> Tensor:
    """``cap * tanh(x / cap)``, in place; ``x`` is contiguous."""
    if _use_kernel(x):
        return _kernels().softcap(x, cap)
    return x.copy_(_accumulate(x).div(cap).tanh_().mul_(cap))


def write_kv(
    k_TKD: Tensor, v_TKV: Tensor, k_cache_NKD: Tensor, v_cache_NKV: Tensor, out_cache_loc_T: Tensor
) -> None:
    """K and V of every token to its slot, in the dtype of the caches."""
    if _use_kernel(k_TKD):
        _kernels().write_kv(k_TKD, v_TKV, k_cache_NKD, v_cache_NKV, out_cache_loc_T)
        return
    k_cache_NKD[out_cache_loc_T] = k_TKD.to(k_cache_NKD.dtype)
    v_cache_NKV[out_cache_loc_T] = v_TKV.to(v_cache_NKV.dtype)


def rotate(x_THD: Tensor, cos_sin_XD: Tensor, positions_T: Tensor) -> Tensor:
    """``x_THD`` rotated at its positions, as a new tensor (plain torch on any device: half-split order)."""
    half = x_THD.shape[-1] // 2
    low, high = _accumulate(x_THD).split(half, dim=-1)
    cos, sin = cos_sin_XD[positions_T].unsqueeze(1).split(half, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1).to(x_THD.dtype)


def rope_write_kv(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKV: Tensor,
    cos_sin_XD: Tensor,
    positions_T: Tensor,
    k_cache_NKD: Tensor,
    v_cache_NKV: Tensor,
    out_cache_loc_T: Tensor,
) -> None:
    """Rotate q in place; rotated K, and V, to their slots. K and V themselves stay as they are."""
    if _use_kernel(q_THD):
        _kernels().rope_write_kv(
            q_THD, k_TKD, v_TKV, cos_sin_XD, positions_T, k_cache_NKD, v_cache_NKV, out_cache_loc_T
        )
        return
    q_THD.copy_(rotate(q_THD, cos_sin_XD, positions_T))
    write_kv(rotate(k_TKD, cos_sin_XD, positions_T), v_TKV, k_cache_NKD, v_cache_NKV, out_cache_loc_T)


def fill_metadata(
    req_to_token_RW: Tensor,
    req_pool_indices_B: Tensor,
    seq_lens_B: Tensor,
    extend_seq_lens_B: Tensor | None,
    page_size: int,
    cache_seqlens_B: Tensor,
    cu_seqlens_q_B1: Tensor,
    cu_seqlens_k_B1: Tensor,
    page_table_BP: Tensor,
) -> None:
    """Lengths, cumulative lengths and the page table of a batch, into tensors that exist."""
    if page_table_BP.is_cuda:
        _kernels().fill_metadata(
            req_to_token_RW, req_pool_indices_B, seq_lens_B, extend_seq_lens_B, page_size,
            cache_seqlens_B, cu_seqlens_q_B1, cu_seqlens_k_B1, page_table_BP,
        )  # fmt: skip
        return
    query_lens_B = torch.ones_like(seq_lens_B) if extend_seq_lens_B is None else extend_seq_lens_B
    cache_seqlens_B.copy_(seq_lens_B)
    for lens_B, cu_seqlens_B1 in ((query_lens_B, cu_seqlens_q_B1), (seq_lens_B, cu_seqlens_k_B1)):
        cu_seqlens_B1[0] = 0
        cu_seqlens_B1[1:] = lens_B.cumsum(0)
    first_P = torch.arange(page_table_BP.shape[1], device=page_table_BP.device) * page_size
    begun_BP = first_P < seq_lens_B[:, None]
    column_P = first_P.clamp(max=req_to_token_RW.shape[1] - 1)  # the last page may reach past the table's end
    pages_BP = req_to_token_RW[req_pool_indices_B[:, None], column_P] // page_size
    page_table_BP.copy_(torch.where(begun_BP, pages_BP, page_table_BP))


def advance_decode(
    req_to_token_RW: Tensor,
    req_pool_indices_B: Tensor,
    seq_lens_B: Tensor,
    positions_B: Tensor,
    out_cache_loc_B: Tensor,
) -> None:
    """One more token for every request: positions, slots and lengths, in place; row 0 is padding and
    stays at length 1.
    """
    if seq_lens_B.is_cuda:
        _kernels().advance_decode(
            req_to_token_RW, req_pool_indices_B, seq_lens_B, positions_B, out_cache_loc_B
        )
        return
    live_B = req_pool_indices_B != 0
    positions_B.copy_(torch.where(live_B, seq_lens_B, 0))
    width = req_to_token_RW.shape[1]
    slots_B = req_to_token_RW[req_pool_indices_B, positions_B.clamp(max=width - 1)]
    out_cache_loc_B.copy_(torch.where(live_B & (positions_B < width), slots_B, 0))
    seq_lens_B.copy_(positions_B + 1)


def compact_pages(
    page_table_BP: Tensor,
    cache_seqlens_B: Tensor,
    page_size: int,
    indptr_B1: Tensor,
    indices: Tensor,
    last_page_len_B: Tensor,
) -> None:
    """The page table as compressed rows: ``indices`` from ``indptr_B1[b]`` on are the pages of request b."""
    arguments = (page_table_BP, cache_seqlens_B, page_size, indptr_B1, indices, last_page_len_B)
    if page_table_BP.is_cuda:
        _kernels().compact_pages(*arguments)
        return
    pages_B = (cache_seqlens_B + page_size - 1) // page_size
    indptr_B1[0] = 0
    indptr_B1[1:] = pages_B.cumsum(0)
    last_page_len_B.copy_(cache_seqlens_B - (pages_B - 1) * page_size)
    of_request_BP = torch.arange(page_table_BP.shape[1], device=page_table_BP.device) < pages_B[:, None]
    pages = page_table_BP[of_request_BP]
    indices[: pages.shape[0]] = pages


def argmax(logits_BX: Tensor, out: Tensor | None = None) -> Tensor:
    """Id of each row's largest logit, int64 [B]: the first of equal ones; NaN counts as the largest."""
    if _use_kernel(logits_BX):
        return _kernels().argmax(logits_BX, out)
    return torch.argmax(logits_BX, dim=-1) if out is None else torch.argmax(logits_BX, dim=-1, out=out)


def sample(
    logits_BX: Tensor,
    temperature_B: Tensor,
    top_k_B: Tensor,
    top_p_B: Tensor,
    min_p_B: Tensor,
    seed_B: Tensor,
    positions_B: Tensor,
    out_B: Tensor,
) -> None:
    """One token for each row into ``out_B`` (int64 [B]), in the order of Hugging Face's warpers: temperature, top-k,
    top-p of what top-k left, min-p relative to the likeliest token, then a draw.

    ``temperature_B`` float32, 0 for ``argmax``; ``top_k_B`` int32, 0 for all; ``top_p_B`` float32 above 0, 1 for all;
    ``min_p_B`` float32, 0 for all; ``seed_B`` int64; ``positions_B`` int32 or int64, below 2**31: the index that the
    token will have in its sequence. All tokens that tie with the last one kept are kept. The noise is a function of
    seed, position and id, so a token does not depend on the batch or the device. NaN and -inf are never drawn; of
    several +inf any may be; a sampled row with neither a finite logit nor +inf gives token 0.
    """
    arguments = (logits_BX, temperature_B, top_k_B, top_p_B, min_p_B, seed_B, positions_B, out_B)
    if _use_kernel(logits_BX):
        _kernels().sample(*arguments)
        return
    sampling_torch.sample(*arguments)
