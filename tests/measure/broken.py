"""Backends with one mistake each, of the kinds that real engines had. They live outside the package: no user can choose
them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fa_research.attention.call import AttentionCall, AttentionOutput
from fa_research.backends import BackendSettings
from fa_research.backends.torch_backend import TorchBackend
from fa_research.config import Config
from fa_research.engine import engine as engine_module
from fa_research.masks import Causal, SlidingWindow
from fa_research.metadata import FlashAttentionMetadata
from fa_research.spec import AttentionSpec


class _Broken(TorchBackend):
    def __init__(self, settings: BackendSettings, specs: Sequence[AttentionSpec]) -> None:
        super().__init__(settings, specs)
        self.calls = 0

    def attend(self, call: AttentionCall) -> AttentionOutput:
        self.calls += 1
        metadata, spec = self.change(call.metadata, call.spec)
        out, lse = super().attend(dataclasses.replace(call, metadata=metadata, spec=spec))
        return self.spoil(out), lse

    def change(
        self, metadata: FlashAttentionMetadata, spec: AttentionSpec
    ) -> tuple[FlashAttentionMetadata, AttentionSpec]:
        return metadata, spec

    def spoil(self, out_THV: Tensor) -> Tensor:
        return out_THV


def _with(metadata: FlashAttentionMetadata, **changes: Any) -> FlashAttentionMetadata:
    return dataclasses.replace(metadata, plans={}, **changes)


class Right(_Broken):
    """No mistake: what the others are compared with."""

    name = "right"


class DropsLastKey(_Broken):
    """Decode does not see the token that it just wrote."""

    name = "drops_last_key"

    def change(self, metadata, spec):  # type: ignore[no-untyped-def]
        if metadata.q_len == 1:
            metadata = _with(metadata, cache_seqlens_int32_B=metadata.cache_seqlens_int32_B - 1)
        return metadata, spec


class WindowOneWider(_Broken):
    name = "window_one_wider"

    def change(self, metadata, spec):  # type: ignore[no-untyped-def]
        assert isinstance(spec.mask, SlidingWindow)
        return metadata, dataclasses.replace(spec, mask=SlidingWindow(spec.mask.size + 1))


class IgnoresMask(_Broken):
    name = "ignores_mask"

    def change(self, metadata, spec):  # type: ignore[no-untyped-def]
        return metadata, dataclasses.replace(spec, mask=Causal())


class WrongScale(_Broken):
    name = "wrong_scale"

    def change(self, metadata, spec):  # type: ignore[no-untyped-def]
        return metadata, dataclasses.replace(spec, scale=spec.scale * 1.05)


class FirstTableForAll(_Broken):
    """Every request reads the first one's pages."""

    name = "first_table_for_all"

    def change(self, metadata, spec):  # type: ignore[no-untyped-def]
        table_BP = metadata.page_table_BP
        return _with(metadata, page_table_BP=table_BP[:1].expand_as(table_BP)), spec


class LongPrefillMixesPages(_Broken):
    """Extend passes of more queries than a chunk of the small text cell has read their pages in the wrong order."""

    name = "long_prefill_mixes_pages"

    def change(self, metadata, spec):  # type: ignore[no-untyped-def]
        if metadata.max_seq_len_q > 7:
            metadata = _with(metadata, page_table_BP=metadata.page_table_BP.roll(1, 1))
        return metadata, spec


class PrefillIsZero(_Broken):
    """Decode is right, over whatever the prefill wrote."""

    name = "prefill_is_zero"

    def attend(self, call: AttentionCall) -> AttentionOutput:
        out, lse = super().attend(call)
        return out * (call.metadata.q_len == 1), lse


class HalvesLastRow(_Broken):
    """The last query of every pass gets half of what it should."""

    name = "halves_last_row"

    def spoil(self, out_THV: Tensor) -> Tensor:
        out_THV[-1] *= 0.5
        return out_THV


class NaNInLastRow(_Broken):
    name = "nan_in_last_row"

    def spoil(self, out_THV: Tensor) -> Tensor:
        out_THV[-1, 0, 0] = float("nan")
        return out_THV


class OneHeadOff(_Broken):
    """Head 1 of the second of two layers is three times as large as it should be, in decode steps alone."""

    name = "one_head_off"

    def attend(self, call: AttentionCall) -> AttentionOutput:
        out, lse = super().attend(call)
        if self.calls % 2 == 0 and call.metadata.q_len == 1:
            out[:, 1] *= 3
        return out, lse


class LastRowOff(_Broken):
    """One query in a whole batch, in one layer of two, off by half a per cent."""

    name = "last_row_off"

    def spoil(self, out_THV: Tensor) -> Tensor:
        if self.calls % 2 == 0:
            out_THV[-1] *= 1.005
        return out_THV


def install(monkeypatch: pytest.MonkeyPatch, backend: type[TorchBackend]) -> None:
    """From now on engines are built with this backend, whatever the config names."""

    def create(
        config: Config,
        specs: Sequence[AttentionSpec],
        device: torch.device,
        dtype: torch.dtype,
        notes: list[str],
    ) -> TorchBackend:
        return backend(
            BackendSettings(device, dtype, config.kv.page_size, config.model.max_context_len), specs
        )

    monkeypatch.setattr(engine_module, "create_backend", create)
