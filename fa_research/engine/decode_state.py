"""The static buffers of a decode step: what a captured graph reads and writes, at addresses that never change.

Legend: B requests (the largest batch these buffers serve).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fa_research.batch import ForwardBatch, ForwardMode
from fa_research.config.limits import require
from fa_research.engine.sampling import GREEDY, SamplingParams, pack
from fa_research.kernels import ops


class DecodeState:
    """Per request: last token (int64), row (int32), tokens in the cache (int32), position and slot of the token at hand
    (int64), and how its tokens are drawn, as ops.sample takes it. Entries past the real batch are padding: row 0, page
    0, length 1, greedy."""

    def __init__(self, max_batch_size: int, device: torch.device) -> None:
        require({"max_batch_size": max_batch_size}, least=0)
        self.max_batch_size = max_batch_size
        self.device = device
        self.input_ids_B = torch.zeros(max_batch_size, dtype=torch.int64, device=device)
        self.positions_B = torch.zeros(max_batch_size, dtype=torch.int64, device=device)
        self.out_cache_loc_B = torch.zeros(max_batch_size, dtype=torch.int64, device=device)
        self.req_pool_indices_B = torch.zeros(max_batch_size, dtype=torch.int32, device=device)
        self.seq_lens_B = torch.ones(max_batch_size, dtype=torch.int32, device=device)
        self.temperature_B = torch.zeros(max_batch_size, dtype=torch.float32, device=device)
        self.top_k_B = torch.zeros(max_batch_size, dtype=torch.int32, device=device)
        self.top_p_B = torch.ones(max_batch_size, dtype=torch.float32, device=device)
        self.min_p_B = torch.zeros(max_batch_size, dtype=torch.float32, device=device)
        self.seed_B = torch.zeros(max_batch_size, dtype=torch.int64, device=device)

    def tensors(self) -> dict[str, Tensor]:
        """The buffers by name (for tests of their addresses)."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def load(self, rows: Sequence[int], seq_lens: Sequence[int], last_tokens: Sequence[int] | Tensor) -> None:
        """Put these requests in front, padding behind. `last_tokens` may be a device tensor (no copy to the host)."""
        size, padding = len(rows), self.max_batch_size - len(rows)
        assert padding >= 0
        staging = torch.tensor(
            [[*rows, *([0] * padding)], [*seq_lens, *([1] * padding)]],
            dtype=torch.int32,
            pin_memory=self.device.type == "cuda",
        )
        rows_B, lens_B = staging.to(self.device, non_blocking=True)
        self.req_pool_indices_B.copy_(rows_B)
        self.seq_lens_B.copy_(lens_B)
        self.input_ids_B.zero_()
        tokens = torch.as_tensor(last_tokens, dtype=torch.int64)
        self.input_ids_B[:size].copy_(tokens, non_blocking=True)

    def load_sampling(self, sampling: Sequence[SamplingParams]) -> None:
        """How these requests' tokens are drawn; padding behind is greedy."""
        padded = [*sampling, *[GREEDY] * (self.max_batch_size - len(sampling))]
        for static_B, packed_B in zip(self._sampling(), pack(padded, self.device), strict=True):
            static_B.copy_(packed_B)

    def sample(self, logits_BX: Tensor) -> None:
        """Draw the next token of the first B entries into `input_ids_B`; their lengths are the tokens' positions."""
        size = logits_BX.shape[0]
        temperature_B, top_k_B, top_p_B, min_p_B, seed_B = (tensor[:size] for tensor in self._sampling())
        positions_B, out_B = self.seq_lens_B[:size], self.input_ids_B[:size]
        ops.sample(logits_BX, temperature_B, top_k_B, top_p_B, min_p_B, seed_B, positions_B, out_B)

    def _sampling(self) -> tuple[Tensor, ...]:
        return self.temperature_B, self.top_k_B, self.top_p_B, self.min_p_B, self.seed_B

    def advance(self, batch_size: int, req_to_token_RW: Tensor, max_seq_len_k: int) -> ForwardBatch:
        """One token further for the first `batch_size` entries, on the device alone: positions, lengths and slots. The
        batch that comes back is made of views of these buffers."""
        ops.advance_decode(
            req_to_token_RW,
            self.req_pool_indices_B[:batch_size],
            self.seq_lens_B[:batch_size],
            self.positions_B[:batch_size],
            self.out_cache_loc_B[:batch_size],
        )
        return self.batch(batch_size, max_seq_len_k)

    def batch(self, batch_size: int, max_seq_len_k: int) -> ForwardBatch:
        """The DECODE batch as the buffers stand."""
        return ForwardBatch(
            mode=ForwardMode.DECODE,
            input_ids_T=self.input_ids_B[:batch_size],
            positions_T=self.positions_B[:batch_size],
            req_pool_indices_B=self.req_pool_indices_B[:batch_size],
            seq_lens_B=self.seq_lens_B[:batch_size],
            out_cache_loc_T=self.out_cache_loc_B[:batch_size],
            max_seq_len_q=1,
            max_seq_len_k=max_seq_len_k,
        )
