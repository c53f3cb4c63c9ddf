"""Every workload at both levels: it asks for exactly what it uses, its work is right, and timing it never runs out."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fa_research import workloads
from fa_research.batch import ForwardBatch, ForwardMode
from fa_research.config import DecodeWorkload, ExtendWorkload, KVConfig, Level, MaskConfig, MeasureConfig
from fa_research.errors import ConfigError, KVCacheFull, Refusal
from fa_research.measure.cell import check
from fa_research.workloads.base import Pass, pick
from tests.workloads.cells import LEVELS, WORKLOADS, build, cell, model_config, prepared

EACH = pytest.mark.parametrize("name", WORKLOADS)
EACH_LEVEL = pytest.mark.parametrize("level", LEVELS, ids=str)
PLACES = [
    *(pytest.param("cpu", "torch", page_size) for page_size in (1, 3, 16, 256)),
    pytest.param("cuda", "triton", 16, marks=pytest.mark.gpu),
    pytest.param("cuda", "fa3", 1, marks=pytest.mark.gpu),
    pytest.param("cuda", "fa3", 64, marks=pytest.mark.gpu),
]


def test_registry() -> None:
    assert workloads.names() == ("decode", "extend", "generate", "mixed", "text", "trace")
    config = cell()
    for name in workloads.names():
        config.workload.name = name
        assert workloads.create(config).name == name
    config.workload.name = "chat"
    with pytest.raises(
        ConfigError,
        match="workload.name=chat is unknown; choose one of decode, extend, generate, mixed, text, trace",
    ):
        workloads.create(config)


@EACH
@EACH_LEVEL
@pytest.mark.parametrize(("device", "backend", "page_size"), PLACES)
def test_what_it_needs_is_enough_and_right(
    name: str, level: Level, device: str, backend: str, page_size: int
) -> None:
    """By default the pool has exactly the pages that the workload asked for: checked, then run as often as the most
    patient measurement would, and checked again. All that nothing wrote is NaN."""
    config = cell(name, level, page_size=page_size, device=device, backend=backend)
    try:
        workload, engine = prepared(config)
    except Refusal as refusal:
        pytest.skip(str(refusal))
    assert engine.cache.allocator.num_pages == workload.needs().pages(page_size)
    passed, columns = check(engine, workload)
    assert passed, columns
    for unit in workload.units():
        for times in (workload.config.measure.warmup, unit.samples, unit.samples if unit.host_time else 0):
            unit.reset()
            for _ in range(times):
                unit.run()
    engine.cache.check()
    if level is Level.model and workload.reprefill:
        assert columns["reprefill_top1_agreement"] == 1.0 or engine.dtype is torch.bfloat16
    if not name.startswith("text"):
        assert engine.cache.allocator.pages_free == 0
        workload.units()[0].reset()
        assert check(engine, workload)[0]


@pytest.mark.parametrize("mask", [MaskConfig("sliding_window", 6), MaskConfig("chunked", 8)])
@pytest.mark.parametrize("name", ["decode", "mixed", "text"])
@EACH_LEVEL
def test_local_masks_sinks_and_softcap(name: str, level: Level, mask: MaskConfig) -> None:
    config = cell(name, level, model=model_config(mask=mask, sink=True, softcap=5.0))
    workload, engine = prepared(config)
    passed, columns = check(engine, workload)
    assert passed, columns


@EACH
@EACH_LEVEL
def test_the_pass_and_the_batch_say_what_ran(name: str, level: Level) -> None:
    workload, engine = prepared(cell(name, level))
    for unit in workload.units():
        unit.run()
    done, batch = workload.current_pass(), workload.batch()
    assert batch.req_pool_indices_B.tolist() == done.rows
    assert batch.seq_lens_B.tolist() == done.seq_lens
    assert batch.max_seq_len_k >= max(done.seq_lens)
    assert sum(done.extend_lens) == batch.num_tokens <= done.num_tokens
    assert done.num_tokens <= max(workload.needs().tokens_per_pass, 4)
    new = (
        3 * 17 if name == "extend-chunks" else sum(done.extend_lens)
    )  # of all chunks; the rest is of the last
    assert workload.units()[-1].tokens == new
    positions = [p for n, new in zip(done.seq_lens, done.extend_lens, strict=True) for p in range(n - new, n)]
    rows = [row for row, new in zip(done.rows, done.extend_lens, strict=True) for _ in range(new)]
    assert batch.positions_T.tolist() == positions
    assert batch.out_cache_loc_T.tolist() == engine.runner.req_to_token_RW[rows, positions].tolist()
    if level is Level.attention:
        assert (
            engine.stack is not None
            and engine.stack.outputs[done.mode, done.num_tokens][0].shape[0] == done.num_tokens
        )


@pytest.mark.parametrize("name", ["decode", "text"])
@pytest.mark.parametrize("warmup", [1, 9])
def test_timing_ends_within_the_steps_that_were_promised(name: str, warmup: int) -> None:
    """`most_steps` steps fit behind the context, and the pool is not larger than that."""
    config = cell(name, page_size=1, measure=MeasureConfig(warmup=warmup, repeats=2, self_test=False))
    workload, _ = prepared(config)
    assert workload.most_steps == max(workload.options.steps, warmup)
    for unit in workload.units():
        if unit.name == "prefill":
            unit.run()
    step = workload.units()[-1]
    for _ in range(2):
        step.reset()
        for _ in range(workload.most_steps):
            step.run()
        with pytest.raises((ConfigError, KVCacheFull)):
            step.run()


@pytest.mark.parametrize("name", ["decode", "text"])
@EACH_LEVEL
def test_every_series_starts_from_the_same_context(name: str, level: Level) -> None:
    workload, engine = prepared(cell(name, level))
    for unit in workload.units():
        if unit.name == "prefill":
            unit.run()
    step, decoder = workload.units()[-1], workload.decoder  # type: ignore[attr-defined]
    lens = [request.seq_len for request in workload.requests]  # type: ignore[attr-defined]
    series = []
    for count in (4, 1, 4):
        step.reset()
        assert decoder.state.seq_lens_B[: len(lens)].tolist() == lens
        for _ in range(count):
            step.run()
        assert workload.current_pass().seq_lens == [n + count for n in lens]
        kv = engine.cache.kv.k_LNKD.nan_to_num(7.0)
        series.append((None if decoder.logits_BX is None else decoder.logits_BX.clone(), kv))
    if level is Level.model:
        torch.testing.assert_close(series[0][0], series[2][0], rtol=0, atol=0)
    assert torch.equal(series[0][1], series[2][1])


def test_decode_lengths() -> None:
    options = DecodeWorkload(batch_size=50, context_len=100, steps=2, length_spread=0.5)
    config = cell(options, model=model_config(max_context_len=256))
    workload, engine = prepared(config)
    lens = [request.seq_len for request in workload.requests]  # type: ignore[attr-defined]
    assert lens[0] == 100 and min(lens) >= 50 and max(lens) == 100 and len(set(lens)) > 10
    again, _ = prepared(config)
    assert [r.seq_len for r in again.requests] == lens  # type: ignore[attr-defined]
    other, _ = prepared(dataclasses.replace(config, seed=1))
    assert [r.seq_len for r in other.requests] != lens  # type: ignore[attr-defined]
    uniform, _ = prepared(
        dataclasses.replace(config, workload=dataclasses.replace(options, length_spread=0.0))
    )
    assert {r.seq_len for r in uniform.requests} == {100}  # type: ignore[attr-defined]
    assert any("ran eagerly" in note for note in engine.notes)  # 50 is above the largest batch size


def test_the_context_is_random_and_no_table_is_in_order() -> None:
    workload, engine = prepared(cell("decode", poison=False, kv=KVConfig(1)))
    request = workload.requests[0]  # type: ignore[attr-defined]
    slots = engine.runner.req_to_token_RW[request.row, :21]
    assert slots.diff().ne(1).sum() > 10
    for layer_id in range(2):
        for data in (engine.cache.kv.k(layer_id), engine.cache.kv.v(layer_id)):
            assert 0.9 < float(data[slots.long()].std()) < 1.1
    assert not torch.equal(engine.cache.kv.k(0), engine.cache.kv.k(1))


def test_no_step_of_a_decode_measurement_allocates() -> None:
    workload, engine = prepared(cell("decode", page_size=1))
    used = engine.cache.allocator.pages_used
    for _ in range(workload.most_steps):
        workload.units()[0].run()
    assert engine.cache.allocator.pages_used == used


@pytest.mark.parametrize("name", ["extend", "mixed"])
def test_an_extend_pass_repeats_itself(name: str) -> None:
    """It takes the same slots every time, so nothing grows while it is timed."""
    workload, engine = prepared(cell(name))
    (unit,) = workload.units()
    used, first = engine.cache.allocator.pages_used, unit.run()
    assert isinstance(first, torch.Tensor)
    for _ in range(3):
        torch.testing.assert_close(unit.run(), first, rtol=0, atol=0)
    assert engine.cache.allocator.pages_used == used


@EACH_LEVEL
def test_chunks_of_an_extend_are_passes_over_what_came_before(level: Level) -> None:
    workload, engine = prepared(cell("extend-chunks", level))
    seen: list[tuple[list[int], list[int]]] = []
    extend_pass = engine.runner.extend_pass

    def watch(batch: ForwardBatch) -> torch.Tensor | None:
        seen.append((batch.positions_T.tolist(), batch.seq_lens_B.tolist()))
        return extend_pass(batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(engine.runner), "extend_pass", lambda _, batch: watch(batch))
        (unit,) = workload.units()
        unit.run()
    assert unit.name == "prefill" and unit.tokens == 3 * 17
    assert seen == [
        ([*range(a, b)] * 3, [b] * 3)
        for a, b in ((5, 12), (12, 19), (19, 22))  # new tokens follow five cached ones
    ]


def test_an_extend_in_chunks_equals_one_pass() -> None:
    """The same tokens over the same cached prefix."""
    options = ExtendWorkload(batch_size=2, new_len=17, prefix_len=5)
    whole, _ = prepared(cell(options))
    expected = whole.units()[0].run()
    for size in (1, 7, 17, 40):
        chunked, _ = prepared(cell(dataclasses.replace(options, chunk_size=size)))
        torch.testing.assert_close(chunked.units()[0].run(), expected)


def test_mixed_batches_have_both_kinds() -> None:
    workload, _ = prepared(cell("mixed"))
    done = workload.current_pass()
    assert done.extend_lens == [9, 9, 1, 1, 1] and done.seq_lens == [12, 12, 22, 22, 22]
    assert workload.batch().mode.name == "MIXED"
    assert done.first_query == [0, 9, 18, 19, 20]


def test_cells_that_do_not_fit_are_refused_by_name() -> None:
    # the warm-up is longer than what is timed, which no check of the workload's own keys sees
    options = DecodeWorkload(batch_size=1, context_len=100, steps=28)
    with pytest.raises(ConfigError, match="context of 129 tokens, model.max_context_len is 128"):
        build(cell(options, measure=MeasureConfig(warmup=29)))
    with pytest.raises(ConfigError, match="kv.num_pages=2 gives 2 pages.*the workload needs "):
        build(cell("decode", kv=KVConfig(16, num_pages=2)))


def test_pick() -> None:
    assert pick(5, 9) == [0, 1, 2, 3, 4]
    assert pick(5, 1) == [4]
    assert pick(9, 3) == [0, 4, 8]
    for count in range(1, 40):
        for wanted in range(1, 40):
            picked = pick(count, wanted)
            assert picked == sorted(set(picked)) and len(picked) == min(count, wanted)
            assert picked[-1] == count - 1 and (wanted == 1 < count or picked[0] == 0)


def test_first_query() -> None:
    assert Pass([1, 2, 3], [9, 9, 9], [4, 1, 2], 7, ForwardMode.MIXED).first_query == [0, 4, 5]
