"""A cache in another dtype than the model's: right by the oracle, half as large, and a cost that quality shows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fa_research.config import Config, Dtype, KVConfig, Level, TextWorkload
from fa_research.errors import Unsupported
from fa_research.measure.cell import check
from fa_research.measure.quality import measure_quality
from fa_research.workloads.text import Text
from tests.measure.broken import DropsLastKey, FirstTableForAll, Right, install
from tests.workloads.cells import build, cell, prepared, text_file

TEXT = TextWorkload(batch_size=3, prompt_len=41, shared_prefix_len=19, chunk_size=7, steps=5)


def with_kv(dtype: Dtype, workload: str = "decode", level: Level = Level.model, **changes: object) -> Config:
    return cell(workload, level, kv=KVConfig(16, dtype), **changes)


@pytest.mark.parametrize("level", Level)
@pytest.mark.parametrize("workload", ["decode", "extend", "mixed", "text"])
@pytest.mark.parametrize("dtype", [Dtype.float16, Dtype.bfloat16])
def test_the_oracle_agrees(dtype: Dtype, workload: str, level: Level) -> None:
    config = with_kv(dtype, workload, level)
    unit, engine = prepared(config)
    assert engine.dtype == torch.float32
    assert engine.kv_dtype == engine.cache.kv.v(0).dtype == getattr(torch, dtype.value)
    passed, columns = check(engine, unit)
    assert passed, columns


@pytest.mark.parametrize("mistake", [FirstTableForAll, DropsLastKey])
@pytest.mark.parametrize("level", Level)
def test_the_oracle_still_sees_a_wrong_backend(
    mistake: type[Right], level: Level, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, mistake)
    unit, engine = prepared(with_kv(Dtype.bfloat16, "decode", level))
    passed, _ = check(engine, unit)
    assert not passed


def test_the_pool_is_half_as_large() -> None:
    sizes = {dtype: build(with_kv(dtype))[1].cache.kv.num_bytes for dtype in (Dtype.auto, Dtype.bfloat16)}
    assert sizes[Dtype.auto] == 2 * sizes[Dtype.bfloat16]


def test_quality_shows_what_it_costs(tmp_path: Path) -> None:
    """The reference reads keys and values as they were computed."""
    TEXT.path = str(text_file(tmp_path))
    cost = {}
    for dtype in (Dtype.float32, Dtype.bfloat16):
        workload, engine = prepared(cell(TEXT, kv=KVConfig(16, dtype)))
        assert isinstance(workload, Text)
        columns = measure_quality(engine, workload)
        cost[dtype] = abs(columns["bits_per_byte"] / columns["oracle_bits_per_byte"] - 1)
    assert cost[Dtype.float32] < 1e-6 < cost[Dtype.bfloat16] < 1e-2


def test_a_kernel_of_one_dtype_refuses() -> None:
    with pytest.raises(
        Unsupported, match=r"kv\.dtype float16: the kernel .* queries alone, float32.*: torch"
    ):
        build(with_kv(Dtype.float16, backend="triton"))
