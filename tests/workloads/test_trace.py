"""Replayed traces: against plain counting without pages, and the cell that a replay leaves."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fa_research.compare.reading import Record
from fa_research.compare.step_work import step_work
from fa_research.config import KVConfig, Level, TraceWorkload
from fa_research.engine.engine import Engine
from fa_research.errors import ConfigError
from fa_research.measure.cell import check, measure
from fa_research.measure.timing import Timer
from fa_research.tracking import Row, Status
from fa_research.workloads.trace import TraceReplay
from fa_research.workloads.traces import BLOCK_SIZE
from tests.workloads.cells import LEVELS, cell, model_config, prepared
from tests.workloads.trace_files import azure, mooncake

PAGE_SIZES = pytest.mark.parametrize("page_size", [1, 7, 16, 64, 256])


def random_lens(count: int, seed: int = 0) -> list[tuple[int, int]]:
    rng = random.Random(seed)
    return [(rng.randint(1, 300), rng.randint(1, 60)) for _ in range(count)]


def replayed(path: str, page_size: int = 16, level: Level = Level.attention, **options: Any) -> TraceReplay:
    workload = built(path, page_size, level, **options)[0]
    workload.engine.cache.check()
    return workload


def built(
    path: str, page_size: int = 16, level: Level = Level.attention, device: str = "cpu", backend: str = "torch",
    invariants: bool = False, **options: Any,
) -> tuple[TraceReplay, Engine]:  # fmt: skip
    defaults: dict[str, Any] = {"requests": 1000, "pool_tokens": 65536, "steps": 3, "chunk_size": 32}
    options = defaults | {"concurrency": 8} | options
    config = cell(
        TraceWorkload(path=path, **options), level, page_size=page_size, device=device, backend=backend,
        model=model_config(max_context_len=4096), poison=invariants,
    )  # fmt: skip
    config.debug.check_invariants = invariants
    workload, engine = prepared(config)
    assert isinstance(workload, TraceReplay)
    return workload, engine


class TokenCounts:
    """The same service without pages, one step at a time: places, and slots rounded up request by request."""

    def __init__(self, lens: Sequence[tuple[int, int]], concurrency: int, page_size: int, pool: int) -> None:
        def slots(tokens: int) -> int:
            return (tokens + page_size - 1) // page_size * page_size

        waiting, live, done = list(lens), [], []  # live: [tokens, tokens at the end]
        self.live = self.tokens = self.waste = self.used = self.steps = self.peak_live = 0
        while True:
            while waiting and len(live) < concurrency:
                reserved = sum(slots(end) for _, end in live)
                if reserved + slots(sum(waiting[0])) > pool:
                    break
                prompt, answer = waiting.pop(0)
                live.append([prompt, prompt + answer])
            for request in live if waiting else ():
                request[0] += 1
            self.steps += 1
            self.live += len(live)
            self.tokens += sum(now for now, _ in live)
            self.waste += sum(slots(now) - now for now, _ in live)
            self.used += sum(slots(now) for now, _ in live)
            self.peak_live = max(self.peak_live, len(live))
            if not waiting:
                self.left = [now for now, _ in live]
                return
            done += [request for request in live if request[0] == request[1]]
            live = [request for request in live if request[0] < request[1]]


@PAGE_SIZES
@pytest.mark.parametrize("pool_tokens", [65536, 1024], ids=["places", "memory"])
def test_capacity_and_waste_are_those_of_plain_counting(
    tmp_path: Path, page_size: int, pool_tokens: int
) -> None:
    lens = random_lens(120)
    workload = replayed(azure(tmp_path, lens), page_size, pool_tokens=pool_tokens)
    expected = TokenCounts(lens, 8, page_size, pool_tokens // page_size * page_size)
    columns = workload.columns({})
    assert columns["trace_steps"] == expected.steps
    assert columns["trace_live_requests_mean"] == expected.live / expected.steps
    assert columns["trace_live_requests_peak"] == expected.peak_live
    assert columns["trace_live_tokens_mean"] == expected.tokens / expected.steps
    assert columns["trace_waste_fraction_mean"] == expected.waste / expected.used
    assert (columns["trace_waste_fraction_mean"] == 0) is (page_size == 1)
    assert workload.context_lens == expected.left
    assert (columns["trace_memory_bound_fraction"] > 0.5) is (pool_tokens == 1024)
    assert columns["trace_prefix_found_tokens"] == 0
    assert any("nothing of prefixes" in note for note in workload.engine.notes)


def conversations(count: int) -> list[tuple[int, int, list[int]]]:
    """Prompts of three conversations under one system prompt; each turn repeats the blocks of the one before."""
    rng, fresh = random.Random(1), iter(range(1, 1000))
    turns: list[list[int]] = [[0], [0], [0]]
    rows = []
    for _ in range(count):
        blocks = rng.choice(turns)
        blocks += [next(fresh) for _ in range(rng.randint(0, 1))]
        blocks[:] = blocks[:6]
        rest = rng.randint(1, BLOCK_SIZE - 1)
        prompt = len(blocks) * BLOCK_SIZE + rest
        rows.append((prompt, rng.randint(1, 40), [*blocks, next(fresh)]))
    return rows


@PAGE_SIZES
def test_prefixes_found_and_shared_are_those_of_the_trace(tmp_path: Path, page_size: int) -> None:
    rows = conversations(40)
    path = mooncake(tmp_path, rows)
    workload = replayed(path, page_size, concurrency=4, retained_fraction=0.8)
    seen: set[int] = set()
    found = shared = hits = 0
    for prompt, _, ids in rows:
        whole = ids[: prompt // BLOCK_SIZE]
        known = next((n for n, block in enumerate(whole) if block not in seen), len(whole)) * BLOCK_SIZE
        seen |= set(whole)
        found += known
        hits += known > 0
        shared += known - known % page_size
    columns = workload.columns({})
    assert columns["trace_prefix_found_tokens"] == found > 0
    assert columns["trace_prefix_hit_tokens"] == shared
    prompts = sum(prompt for prompt, _, _ in rows)
    assert columns["trace_prefix_hit_fraction"] == shared / prompts
    assert columns["trace_prefix_loss_bound_fraction"] == hits * (page_size - 1) / prompts
    assert (shared < found) is (page_size == 7)
    alone = replayed(path, page_size, concurrency=4, prefix_sharing=False).columns({})
    assert alone["trace_prefix_found_tokens"] == 0


def test_only_a_retained_prompt_is_found_when_nobody_else_is_live(tmp_path: Path) -> None:
    path = mooncake(tmp_path, [(600, 5, [1, 2]), (700, 5, [1, 3])])
    for fraction, found in ((0.5, 512), (0.0, 0)):
        columns = replayed(path, concurrency=1, retained_fraction=fraction).columns({})
        assert columns["trace_prefix_found_tokens"] == found


def test_what_goes_first_is_what_was_used_least_recently(tmp_path: Path) -> None:
    """Two may be retained, and three are done: the first is older than the second, but the third began with it."""
    first, second, third = (1030, 1, [1, 2, 20]), (1030, 5, [3, 4, 21]), (1030, 6, [1, 9, 22])
    rows = [first, second, third, (100, 50, [23]), (1030, 1, [1, 2, 24])]
    workload = replayed(mooncake(tmp_path, rows), concurrency=2, retained_fraction=0.9)
    assert workload.columns({})["trace_prefix_found_tokens"] == 1 * BLOCK_SIZE + 2 * BLOCK_SIZE


def test_waste_counts_a_shared_page_once_and_what_is_retained(tmp_path: Path) -> None:
    """One request at a time, pages of 256: counted by hand."""
    path = mooncake(tmp_path, [(1100, 2, [1, 2, 3]), (700, 2, [1, 4]), (100, 1, [9])])
    columns = replayed(path, 256, concurrency=1, retained_fraction=0.9).columns({})
    # The first: 5 pages, 1101 and 1102 tokens; its four whole pages are retained. The second: two of these and one page
    # of its own, 701 and 702 tokens; it leaves no whole page that is new. The third: one page, 100 tokens.
    empty = [1280 - 1101, 1280 - 1102, 768 - 701, 768 - 702, 256 - 100]
    assert columns["trace_waste_fraction_mean"] == sum(empty) / (5 * 1280)
    assert columns["trace_waste_fraction_peak"] == empty[1] / 1280
    assert columns["trace_live_requests_mean"] == 1 and columns["trace_steps"] == 5
    assert columns["trace_page_table_bytes_read"] == 1 * 4 * 2  # a page, int32, two layers


@pytest.mark.parametrize("page_size", [1, 16, 256])
def test_a_prefix_of_two_live_requests_is_stored_once(tmp_path: Path, page_size: int) -> None:
    path = mooncake(tmp_path, [(1100, 9, [1, 2, 3]), (1030, 9, [1, 2, 4]), (2048, 9, [1, 2, 5, 6])])
    workload = replayed(path, page_size)
    first, second, third = (live.cached for live in workload.replay.live)
    count = 1024 // page_size
    assert first.pages[:count] == second.pages[:count] == third.pages[:count]
    assert not set(first.pages[count:]) & set(second.pages[count:])
    cache = workload.engine.cache
    ends = [n + workload.most_steps for n in (1100, 1030, 2048)]
    assert cache.allocator.pages_used == sum(-(-n // page_size) for n in ends) - 2 * count
    table = cache.req_to_token.req_to_token
    assert table[second.row, :1024].equal(table[first.row, :1024])


def test_the_extend_pass_leaves_shared_pages_alone(tmp_path: Path) -> None:
    """The chunk is longer than what the last prompt has of its own."""
    path = mooncake(tmp_path, [(1100, 9, [1, 2, 3]), (1030, 9, [1, 2, 4])])
    workload = replayed(path, chunk_size=512)
    extend = workload.units()[0]
    kv = workload.engine.cache.kv.k_LNKD
    before = kv.clone()
    extend.run()
    assert extend.tokens == 1030 - 1024
    written = (kv != before).flatten(2).any(-1).any(0).nonzero().flatten().tolist()
    row = workload.requests[-1].row
    assert written == sorted(workload.engine.cache.req_to_token.req_to_token[row, 1024:1030].tolist())


def test_the_same_prompt_twice_leaves_a_token_to_compute(tmp_path: Path) -> None:
    path = mooncake(tmp_path, [(1024, 9, [1, 2]), (1024, 9, [1, 2])])
    workload = replayed(path, 256)
    assert workload.columns({})["trace_prefix_hit_tokens"] == 768
    assert workload.current_pass().rows == [live.cached.row for live in workload.replay.live]


def test_a_request_that_never_fits_is_counted(tmp_path: Path) -> None:
    lens = [(100, 5), (400, 20), (90, 5), (420, 1), (80, 5)]
    workload = replayed(azure(tmp_path, lens), pool_tokens=416)
    columns = workload.columns({})
    assert (columns["trace_requests_never_fit"], columns["trace_requests_admitted"]) == (2, 3)
    assert any("2 requests are longer than the whole pool" in note for note in workload.engine.notes)
    with pytest.raises(ConfigError, match=r"pool_tokens=256: none of the 1 requests fits"):
        replayed(azure(tmp_path, [(400, 20)]), pool_tokens=256)


def test_the_work_of_the_timed_step_can_be_told_from_its_row(tmp_path: Path) -> None:
    workload = replayed(azure(tmp_path, [(60, 4), (31, 9), (17, 5), (44, 3)]), concurrency=3)
    step = {"decode_step_us": 123.4}
    row = Row(Status.ok, metrics=step | workload.columns(step))
    work = step_work(Record(row, tmp_path, 1))
    assert work == (len(workload.requests), sum(request.seq_len for request in workload.requests))


def test_a_pool_without_room_for_the_timed_steps_drops_requests(tmp_path: Path) -> None:
    workload = replayed(azure(tmp_path, [(60, 4)] * 8), page_size=1, pool_tokens=256, concurrency=8)
    assert workload.replay.counts.peak_live == 4
    assert workload.columns({})["trace_step_requests"] == 4
    workload = replayed(azure(tmp_path, [(63, 1)] * 8), page_size=1, pool_tokens=256, steps=16)
    assert workload.columns({})["trace_step_requests"] == 3
    assert any("1 requests were dropped" in note for note in workload.engine.notes)


@pytest.mark.parametrize("level", LEVELS, ids=str)
@pytest.mark.parametrize(
    ("device", "backend", "page_size"),
    [
        *(("cpu", "torch", page_size) for page_size in (1, 7, 256)),
        *(pytest.param("cuda", name, size, marks=pytest.mark.gpu) for name in ("triton", "fa3") for size in (1, 64)),
    ],
)  # fmt: skip
def test_the_tables_that_a_replay_leaves_are_checked_and_timed(
    tmp_path: Path, level: Level, device: str, backend: str, page_size: int
) -> None:
    """Every invariant after every operation, NaN in every slot that nobody holds; times and columns as in a row."""
    rows = conversations(12)
    options = {"concurrency": 3, "pool_tokens": 12000, "retained_fraction": 0.4, "invariants": True}
    workload, engine = built(mooncake(tmp_path, rows), page_size, level, device, backend, **options)
    passed, columns = check(engine, workload)
    assert passed, columns
    timer = Timer(engine.device, warmup=1, max_seconds=1.0, l2=workload.config.measure.l2)
    metrics = measure(engine, workload, timer, lambda name: None).metrics
    assert metrics["trace_tokens_per_s"] > 0 and metrics["extend_pass_us"] > 0
    for unit in workload.units():
        unit.reset()
        unit.run()
        done, batch = workload.current_pass(), workload.batch()
        assert batch.req_pool_indices_B.tolist() == done.rows
        assert batch.seq_lens_B.tolist() == done.seq_lens
        assert unit.tokens == sum(done.extend_lens) == batch.num_tokens
    assert check(engine, workload)[0]
    last = workload.replay.live[-1]
    assert workload.context_lens[-1] == rows[-1][0] == last.trace.input_length
    for live in workload.replay.live:
        engine.cache.close(live.cached)
    assert engine.cache.allocator.pages_used == 0, "every page was somebody's whom the replay knows"


@pytest.mark.parametrize(
    ("options", "kv", "message"),
    [
        ({"requests": 0}, {}, "workload.requests=0"),
        ({"concurrency": 0}, {}, "workload.concurrency=0"),
        ({"max_context": 1}, {}, "workload.max_context=1: must be at least 2"),
        ({"max_context": 4000}, {}, "workload.max_context=4000 + workload.steps=16 = 4016 tokens"),
        ({"pool_tokens": 5}, {}, "workload.pool_tokens=5"),
        ({"retained_fraction": 1.0}, {}, "workload.retained_fraction=1.0"),
        ({"pool_tokens": None}, {}, "give it, kv.num_pages or kv.memory_fraction"),
        ({}, {"num_pages": 9}, "workload.pool_tokens=131072 and kv.num_pages=9"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], kv: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        cell(TraceWorkload(**options), model=model_config(max_context_len=4010), kv=KVConfig(**kv))
    assert message in str(error.value)


def test_a_pool_from_kv_num_pages(tmp_path: Path) -> None:
    options = TraceWorkload(path=azure(tmp_path, random_lens(9)), pool_tokens=None, concurrency=2)
    config = cell(
        options, Level.attention, model=model_config(max_context_len=512), kv=KVConfig(16, num_pages=40)
    )
    workload, engine = prepared(config)
    assert engine.cache.allocator.num_pages == 40
    assert check(engine, workload)[0]
