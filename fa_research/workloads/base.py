"""What a workload is: from a config to requests in the cache, and one unit of work to check and to time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fa_research.batch import ForwardBatch, ForwardMode
from fa_research.config import Config
from fa_research.engine.engine import Engine, Needs
from fa_research.kv_cache import CachedRequest

_MIXTURE_REQUESTS = 8

# Legend: T tokens, B requests, X vocabulary, M positions that have logits.


@dataclass(slots=True)
class Case:
    """One request's result, for the oracle to repeat: `tokens_T` follow the first `prefix_len` tokens of row
    `row` in the cache, and `logits_MX` were produced at the positions `at_M` (indices into the new
    tokens). `request` is its index in the batch."""

    row: int
    prefix_len: int
    tokens_T: Tensor
    at_M: Tensor
    logits_MX: Tensor
    request: int = 0


@dataclass(slots=True)
class Pass:
    """One forward pass as the host sees it; `extend_lens` are 1 for decode. `num_tokens` counts what ran,
    padded entries too; `first_query` is where each request's queries start in the ragged batch."""

    rows: list[int]
    seq_lens: list[int]
    extend_lens: list[int]
    num_tokens: int
    mode: ForwardMode

    @property
    def first_query(self) -> list[int]:
        starts, total = [], 0
        for extend_len in self.extend_lens:
            starts.append(total)
            total += extend_len
        return starts


def no_reset() -> None:
    """The reset of a unit that leaves lengths and positions unchanged."""


@dataclass(frozen=True, slots=True)
class Unit:
    """Something to time. `run` launches it and waits for nothing; `tokens` are the new tokens it handles,
    `samples` how many times it is to be timed. `reset` puts back what `run` moves on (the context's length),
    so that every series of samples starts alike. `host_time`: time the host's share too (what launching it
    costs). `launch` is `run` with its kernels launched one by one, where `run` may replay a graph: the ledger
    learns from it what each kernel is for. `prompt_tokens`: of a prefill, all tokens of the prompts, those among them
    that were in the cache, or shared and computed once; `tokens` are then those that were computed."""

    name: str
    run: Callable[[], object]
    tokens: int
    samples: int
    host_time: bool = False
    reset: Callable[[], object] = no_reset
    launch: Callable[[], object] | None = None
    prompt_tokens: int | None = None


class Workload(ABC):
    """One workload over one engine. The order of calls: `needs`, `prepare`, `checked_passes` (unless
    `measure.check=false`), then the `units` as often as they are timed."""

    name: ClassVar[str]
    reprefill: ClassVar[bool] = False  # its cases can be repeated by one extend pass without a prefix

    def __init__(self, config: Config) -> None:
        self.config = config
        self.options: Any = config.workload

    @abstractmethod
    def needs(self) -> Needs:
        """Requests, lengths and tokens, before anything is built."""

    @abstractmethod
    def prepare(self, engine: Engine) -> None:
        """Requests in the cache, ready for the first unit."""

    @abstractmethod
    def checked_passes(self) -> tuple[list[Pass], list[Case]]:
        """Work whose result is kept for the oracle: the last pass of each kind that is timed, and the cases (none at
        `workload.level=attention`)."""

    @abstractmethod
    def units(self) -> list[Unit]:
        """What to time, in this order."""

    @abstractmethod
    def current_pass(self) -> Pass:
        """The last unit as the host sees it, for bytes and operations."""

    @abstractmethod
    def batch(self) -> ForwardBatch:
        """The last unit as the backend sees it, to time the parts of its attention path one by one."""

    def columns(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """What the row says of the workload itself, beside the `metrics` that were timed."""
        return {}

    @property
    def most_steps(self) -> int:
        """The most decode steps in a row that a cell runs: the timed ones, or the warm-up before them."""
        return max(int(self.options.steps), self.config.measure.warmup)


def random_tokens(count: int, vocab_size: int, generator: torch.Generator) -> Tensor:
    """Uniform token ids on the CPU, int64 [count]."""
    return torch.randint(vocab_size, (count,), generator=generator)


def open_with_context(engine: Engine, context_lens: Sequence[int]) -> list[CachedRequest]:
    """New requests that own that many tokens of whatever the pool holds."""
    requests = [engine.cache.open() for _ in context_lens]
    engine.cache.extend(requests, context_lens)
    return requests


def pick(count: int, wanted: int) -> list[int]:
    """Up to `wanted` of `count` indices, evenly spread, first and last among them."""
    if wanted >= count:
        return list(range(count))
    if wanted == 1:
        return [count - 1]
    return sorted({round(i * (count - 1) / (wanted - 1)) for i in range(wanted)})


def checked(config: Config, count: int) -> list[int]:
    """Which of `count` requests the oracle repeats: `measure.check_requests`, of a mixture of experts at least 8, since
    its median position decides."""
    wanted = config.measure.check_requests
    return pick(count, max(wanted, _MIXTURE_REQUESTS) if config.model.moe.num_experts else wanted)


def fill_context(engine: Engine, seed: int) -> None:
    """Random keys and values in every slot; with `debug.poison`, NaN in the sink page and in every free page.
    Call it when the requests own their pages."""
    engine.cache.kv.fill_random(seed)
    if engine.config.debug.poison:
        engine.cache.kv.poison([0, *engine.cache.allocator.free_pages()])
