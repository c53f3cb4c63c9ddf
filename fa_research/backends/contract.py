"""Whether what a backend's `attend` returned is what the contract promises: by shape, dtype and device, which the host
knows without waiting for the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fa_research.attention.call import AttentionCall, AttentionOutput
from fa_research.errors import BackendFault


def checked(result: Any, call: AttentionCall, name: str, *, padded: bool = False) -> AttentionOutput:
    """`result` of backend `name` for `call`, if it is (output, LSE): the output [T, H, V] in the query's dtype; the LSE
    [T, H] in float32, looked at only where it was asked for. padded: the last tokens may be padding, which needs no
    result.

    Raises BackendFault, which says what was returned and what was expected.
    """
    q_THD, spec = call.q_THD, call.spec
    if not isinstance(result, tuple | list) or len(result) != 2:
        kind = (
            f"{type(result).__name__} of {len(result)}" if isinstance(result, tuple | list) else _said(result)
        )
        raise BackendFault(f"backend {name} returned {kind}, expected the pair (output, LSE or None)")
    out, lse = result
    tokens = out.shape[0] if padded and isinstance(out, Tensor) and out.ndim else q_THD.shape[0]
    shape = (min(tokens, q_THD.shape[0]), spec.num_heads, spec.v_head_dim)
    wrong = []
    if not _is(out, shape, q_THD.dtype, q_THD.device):
        wrong.append(_differs("", out, shape, q_THD.dtype, q_THD.device))
    if call.return_lse and not _is(lse, shape[:2], torch.float32, q_THD.device):
        wrong.append(_differs("as LSE ", lse, shape[:2], torch.float32, q_THD.device))
    if wrong:
        raise BackendFault(f"backend {name} returned {'; and '.join(wrong)}")
    return out, lse


def _is(value: Any, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> bool:
    return (
        isinstance(value, Tensor) and value.shape == shape and value.dtype == dtype and value.device == device
    )


def _differs(what: str, value: Any, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> str:
    given, expected = _said(value), _words(shape, dtype)
    if isinstance(value, Tensor) and value.device != device:
        given, expected = f"{given} on {value.device}", f"{expected} on {device}"
    return f"{what}{given}, expected {expected}"


def _said(value: Any) -> str:
    if isinstance(value, Tensor):
        return _words(tuple(value.shape), value.dtype)
    return "None" if value is None else f"a value of type {type(value).__name__}"


def _words(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    return f"[{','.join(map(str, shape))}] {str(dtype).removeprefix('torch.')}"
