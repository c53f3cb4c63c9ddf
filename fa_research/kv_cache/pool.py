"""Second level of the cache: token slots -> keys and values of every layer (SGLang's `MHATokenToKVPool`).

Legend: L layers, N slots, P pages, S slots in a page, K KV heads, D head dim, V value head dim, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fa_research.errors import ConfigError
from fa_research.kernels import ops


class TokenToKVPool:
    """Keys [L, N, K, D] and values [L, N, K, V] in one allocation each; N = (num_pages + 1) * page_size, because page 0
    is the null page, where padded entries write. This class is the only writer of keys and values.

    The buffers start as zeros: a kernel may load, and multiply by an exact zero, what lies past a request's end in
    its last page (FA3's TMA path does), so that memory must hold finite numbers.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        v_head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        sizes = {
            "kv.num_pages": num_pages,
            "num_layers": num_layers,
            "num_kv_heads": num_kv_heads,
            "head_dim": head_dim,
            "v_head_dim": v_head_dim,
        }
        for key, value in sizes.items():
            if value < 1:
                raise ConfigError(f"{key}={value}: must be at least 1")
        if not 1 <= page_size <= 256:
            raise ConfigError(f"kv.page_size={page_size}: must be from 1 to 256 slots")
        self.num_pages = num_pages
        self.page_size = page_size
        self.num_slots = (num_pages + 1) * page_size
        self.num_layers = num_layers
        shape = (num_layers, self.num_slots, num_kv_heads)
        # A tensor of inference mode's own does not know its views, which JAX's handles of the pool go by.
        with torch.inference_mode(False):
            self.k_LNKD = torch.zeros(*shape, head_dim, dtype=dtype, device=device)
            self.v_LNKV = torch.zeros(*shape, v_head_dim, dtype=dtype, device=device)

    @staticmethod
    def bytes_per_page(
        page_size: int,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        v_head_dim: int,
        dtype: torch.dtype,
    ) -> int:
        """Bytes that one page takes over all layers, keys and values."""
        return page_size * num_layers * num_kv_heads * (head_dim + v_head_dim) * dtype.itemsize

    @property
    def num_bytes(self) -> int:
        return self.k_LNKD.nbytes + self.v_LNKV.nbytes

    def k(self, layer_id: int) -> Tensor:
        """Keys of one layer, [N, K, D]."""
        return self.k_LNKD[layer_id]

    def v(self, layer_id: int) -> Tensor:
        """Values of one layer, [N, K, V]."""
        return self.v_LNKV[layer_id]

    def k_paged(self, layer_id: int) -> Tensor:
        """Keys of one layer as pages, [P, S, K, D], without a copy."""
        return self.k(layer_id).unflatten(0, (-1, self.page_size))

    def v_paged(self, layer_id: int) -> Tensor:
        """Values of one layer as pages, [P, S, K, V], without a copy."""
        return self.v(layer_id).unflatten(0, (-1, self.page_size))

    def write(self, layer_id: int, k_TKD: Tensor, v_TKV: Tensor, out_cache_loc_T: Tensor) -> None:
        """Store keys and values at the slots `out_cache_loc_T` (int64)."""
        ops.write_kv(k_TKD, v_TKV, self.k(layer_id), self.v(layer_id), out_cache_loc_T)

    def rope_and_write(
        self,
        layer_id: int,
        q_THD: Tensor,
        k_TKD: Tensor,
        v_TKV: Tensor,
        cos_sin_XD: Tensor,
        positions_T: Tensor,
        out_cache_loc_T: Tensor,
    ) -> None:
        """Rotate `q_THD` in place and store the rotated keys and the values; one kernel on the GPU, so that keys are
        read and written once."""
        k_cache, v_cache = self.k(layer_id), self.v(layer_id)
        ops.rope_write_kv(q_THD, k_TKD, v_TKV, cos_sin_XD, positions_T, k_cache, v_cache, out_cache_loc_T)

    def fill_random(self, seed: int) -> None:
        """Standard-normal keys and values everywhere: what a benchmark reads when nothing was prefilled. Zeros would
        flatter it, since they draw less power."""
        generator = torch.Generator(device=self.k_LNKD.device).manual_seed(seed)
        for layer_id in range(self.num_layers):
            self.k(layer_id).normal_(generator=generator)
            self.v(layer_id).normal_(generator=generator)

    def poison(self, pages: Sequence[int] | None = None) -> None:
        """NaN in these pages (None: everywhere), so that a read of a slot that nothing wrote shows in the result."""
        self._fill(pages, float("nan"))

    def clear(self, pages: Sequence[int]) -> None:
        """Zeros in these pages."""
        self._fill(pages, 0.0)

    def _fill(self, pages: Sequence[int] | None, value: float) -> None:
        for buffer in (self.k_LNKD, self.v_LNKV):
            paged = buffer.unflatten(1, (-1, self.page_size))
            paged[:, slice(None) if pages is None else list(pages)] = value
