"""One forward pass as data (SGLang's `ForwardBatch`).

Legend: T query tokens of the ragged batch, B requests, R request rows, W table width in slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from fa_research.errors import ConfigError


class ForwardMode(Enum):
    """EXTEND: requests gain many tokens (prefill, chunked prefill, prefix-cache hit). DECODE: one token each.
    MIXED: both in one ragged batch."""

    EXTEND = "extend"
    DECODE = "decode"
    MIXED = "mixed"


@dataclass(slots=True)
class ForwardBatch:
    """What one forward pass works on. All tensors are on the device.

    input_ids_T, positions_T, out_cache_loc_T: int64. req_pool_indices_B, seq_lens_B (new tokens included),
    extend_seq_lens_B (None for DECODE, where each is 1): int32. max_seq_len_q/k are host numbers, so no
    kernel launch waits for the device; in a captured step max_seq_len_k is the largest length that a replay
    may reach. extend_seq_lens_cpu and seq_lens_cpu are the host's copies (empty where only the device knows:
    decode steps)."""

    mode: ForwardMode
    input_ids_T: Tensor
    positions_T: Tensor
    req_pool_indices_B: Tensor
    seq_lens_B: Tensor
    out_cache_loc_T: Tensor
    max_seq_len_q: int
    max_seq_len_k: int
    extend_seq_lens_B: Tensor | None = None
    seq_lens_cpu: tuple[int, ...] = ()
    extend_seq_lens_cpu: tuple[int, ...] = ()

    @property
    def batch_size(self) -> int:
        return self.seq_lens_B.shape[0]

    @property
    def q_len(self) -> int | None:
        """Query tokens of each request where all have the same number by the kind of pass (1: a decode step), None for
        a ragged pass."""
        return 1 if self.mode is ForwardMode.DECODE else None

    @property
    def num_tokens(self) -> int:
        return self.input_ids_T.shape[0]


def extend_batch(
    req_to_token_RW: Tensor,
    rows: Sequence[int],
    prefix_lens: Sequence[int],
    new_tokens: Sequence[Sequence[int] | Tensor],
) -> ForwardBatch:
    """The EXTEND (or, where some requests gain one token and others many, MIXED) batch in which request
    `rows[i]` has `prefix_lens[i]` tokens in the cache and gains `new_tokens[i]`. The table must hold slots
    for all of them.

    The host's numbers travel in one pinned copy; slots are looked up on the device. Raises ConfigError
    for no requests, or for a request without new tokens."""
    extend_lens = _extend_lens(new_tokens)
    seq_lens = tuple(prefix + new for prefix, new in zip(prefix_lens, extend_lens, strict=True))
    per_token, per_request = _upload(
        req_to_token_RW.device, rows, prefix_lens, new_tokens, seq_lens, extend_lens
    )
    input_ids_T, positions_T, rows_T = per_token
    rows_B, seq_lens_B, extend_lens_B = per_request.to(torch.int32)
    return ForwardBatch(
        mode=_mode(extend_lens),
        input_ids_T=input_ids_T,
        positions_T=positions_T,
        req_pool_indices_B=rows_B,
        seq_lens_B=seq_lens_B,
        out_cache_loc_T=req_to_token_RW[rows_T, positions_T].long(),
        max_seq_len_q=max(extend_lens),
        max_seq_len_k=max(seq_lens),
        extend_seq_lens_B=extend_lens_B,
        seq_lens_cpu=seq_lens,
        extend_seq_lens_cpu=extend_lens,
    )


def _extend_lens(new_tokens: Sequence[Sequence[int] | Tensor]) -> tuple[int, ...]:
    extend_lens = tuple(len(tokens) for tokens in new_tokens)
    if not extend_lens or min(extend_lens) < 1:
        raise ConfigError(
            f"every request of an extend batch needs at least one new token, got lengths {extend_lens}"
        )
    return extend_lens


def _mode(extend_lens: Sequence[int]) -> ForwardMode:
    many, one = max(extend_lens) > 1, min(extend_lens) == 1
    return ForwardMode.MIXED if many and one else ForwardMode.EXTEND


def _upload(
    device: torch.device,
    rows: Sequence[int],
    prefix_lens: Sequence[int],
    new_tokens: Sequence[Sequence[int] | Tensor],
    seq_lens: Sequence[int],
    extend_lens: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """[3, T] (token ids, positions, rows) and [3, B] (rows, lengths, new lengths), int64, in one
    host-to-device copy."""
    num_tokens, num_requests = sum(extend_lens), len(rows)
    staging = torch.empty(
        3 * (num_tokens + num_requests), dtype=torch.int64, pin_memory=device.type == "cuda"
    )
    per_token = staging[: 3 * num_tokens].view(3, num_tokens)
    per_request = staging[3 * num_tokens :].view(3, num_requests)
    start = 0
    for row, prefix, tokens in zip(rows, prefix_lens, new_tokens, strict=True):
        end = start + len(tokens)
        per_token[0, start:end] = torch.as_tensor(tokens, dtype=torch.int64)
        per_token[1, start:end] = torch.arange(prefix, prefix + len(tokens))
        per_token[2, start:end] = row
        start = end
    per_request[:] = torch.tensor([list(rows), list(seq_lens), list(extend_lens)], dtype=torch.int64)
    on_device = staging.to(device, non_blocking=True)
    return on_device[: 3 * num_tokens].view(3, num_tokens), on_device[3 * num_tokens :].view(3, num_requests)
