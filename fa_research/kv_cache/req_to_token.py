"""First level of the cache: request row -> token slots (SGLang's `ReqToTokenPool`)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fa_research.errors import ConfigError

# Legend: R request rows, W width in slots (a whole number of pages), S slots in a page.


class ReqToTokenPool:
    """`req_to_token` is int32 [max_requests + 1, W] on the device. Row 0 is never handed out: the padded
    entries of a CUDA-graph batch point at it, and it points at page 0."""

    def __init__(
        self, max_requests: int, max_context_len: int, *, page_size: int, device: torch.device | str
    ) -> None:
        for key, value in (("max_requests", max_requests), ("max_context_len", max_context_len)):
            if value < 1:
                raise ConfigError(f"{key}={value}: must be at least 1")
        if not 1 <= page_size <= 256:
            raise ConfigError(f"kv.page_size={page_size}: must be from 1 to 256 slots")
        self.max_requests = max_requests
        self.max_context_len = max_context_len
        self.page_size = page_size
        width = -(-max_context_len // page_size) * page_size
        self.req_to_token = torch.zeros(max_requests + 1, width, dtype=torch.int32, device=device)
        self._free_rows = list(range(max_requests, 0, -1))

    @property
    def rows_free(self) -> int:
        return len(self._free_rows)

    def alloc(self) -> int:
        """A free row. Raises ConfigError when all are taken."""
        if not self._free_rows:
            raise ConfigError(
                f"kv.max_requests={self.max_requests} rows are all in use; "
                "raise kv.max_requests or run fewer requests at once"
            )
        return self._free_rows.pop()

    def free(self, row: int) -> None:
        """Give a row back. It points at the null page again: nothing may reach another request's pages by
        it."""
        assert 0 < row <= self.max_requests and row not in self._free_rows, f"row {row} is freed twice"
        self.req_to_token[row].zero_()
        self._free_rows.append(row)

    def write_pages(
        self, rows: Sequence[int], firsts: Sequence[int], counts: Sequence[int], pages: Sequence[int]
    ) -> None:
        """Point `counts[i]` entries of row `rows[i]`, from page number `firsts[i]` on, at the next ones of `pages`: one
        small copy to the device and one scatter on the current stream, so that kernels launched before still read the
        table as it was."""
        if not len(pages):
            return
        device = self.req_to_token.device
        update = torch.empty(3, len(pages), dtype=torch.int64, pin_memory=device.type == "cuda")
        row_P, index_P, page_P = update.numpy()
        ends = np.cumsum(counts)
        row_P[:] = np.repeat(rows, counts)
        index_P[:] = np.arange(len(pages)) + np.repeat(firsts - ends + counts, counts)
        page_P[:] = pages
        row, index, page = update.to(device, non_blocking=True)
        table_RPS = self.req_to_token.view(self.max_requests + 1, -1, self.page_size)
        offsets_S = torch.arange(self.page_size, dtype=torch.int32, device=device)
        table_RPS[row, index] = (page * self.page_size)[:, None].to(torch.int32) + offsets_S
