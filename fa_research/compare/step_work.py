"""What a timed step was of, where a row's config does not settle it: a replayed trace ends with the requests that its
pool and pages let in."""

from __future__ import annotations

from collections.abc import Sequence

from fa_research.compare.reading import Record, is_number
from fa_research.errors import ConfigError
from fa_research.tracking import Status

REQUESTS, TOKENS = "trace_step_requests", "trace_step_tokens"
PER_TOKEN = "trace_tokens_per_s"
_OF_THE_STEP = ("decode_step", "attention", "metadata", "kv_write")
_SAME = 0.001  # fraction of cached tokens; a tenth of what is a tie


class UnequalWork(ConfigError):
    """No two rows that match have timed steps of equal work."""


def step_work(record: Record) -> tuple[int, int]:
    """Requests and cached tokens of the timed step; zeros where the config settles them.

    Older rows do not hold the tokens: they are what `workloads/trace.py` has scaled the rate of tokens by."""
    metrics = record.row.metrics
    if is_number(metrics.get(REQUESTS)) and is_number(metrics.get(TOKENS)):
        return int(metrics[REQUESTS]), int(metrics[TOKENS])
    names = (PER_TOKEN, "decode_step_us", "trace_live_tokens_mean", "trace_live_requests_mean")
    requests, *known = (metrics.get(name) for name in (REQUESTS, *names))
    if not is_number(requests):
        return 0, 0
    numbers = [float(value) for value in known if is_number(value) and value > 0]
    if len(numbers) < len(names):
        return int(requests), 0
    rate, step_us, mean_tokens, mean_requests = numbers
    return int(requests), round(rate * step_us / 1e6 * mean_tokens / mean_requests)


def by_work(records: Sequence[Record], metric: str) -> list[list[Record]]:
    """The rows in groups whose steps were of as many requests and tokens. Rows that are not `ok` go to all groups."""
    done = [record for record in records if record.row.status is Status.ok]
    if not metric.startswith(_OF_THE_STEP) or not done:
        return [list(records)]
    groups: list[list[Record]] = []
    for record in sorted(done, key=step_work):
        if groups and _is_same(step_work(groups[-1][0]), step_work(record)):
            groups[-1].append(record)
        else:
            groups.append([record])
    if len(groups) == 1:
        return [list(records)]
    others = [record for record in records if record.row.status is not Status.ok]
    return [[*members, *others] for members in groups]


def _is_same(less: tuple[int, int], more: tuple[int, int]) -> bool:
    return less[0] == more[0] and more[1] <= less[1] * (1 + _SAME)


def unequal_words(groups: Sequence[Sequence[Record]]) -> str:
    """Of groups of rows whose steps were of different work: how much they differ where they do most, and which metric
    takes that out, if the rows have it."""
    done = [[record for record in records if record.row.status is Status.ok] for records in groups]
    spreads = [
        [_spread(list(numbers)) for numbers in zip(*map(step_work, rows), strict=True)] for rows in done
    ]
    requests, tokens = max(spreads, key=lambda spread: spread[1][1] / (spread[1][0] or 1))
    said = f"{_range(requests)} requests" + f" with {_range(tokens)} cached tokens" * bool(tokens[0])
    rated = any(is_number(record.row.metrics.get(PER_TOKEN)) for rows in done for record in rows)
    hint = f" (--metric {PER_TOKEN} goes by the time per cached token)" * rated
    return f"of different work, such as {said}{hint}"


def _spread(numbers: Sequence[int]) -> tuple[int, int]:
    return min(numbers), max(numbers)


def _range(ends: tuple[int, int]) -> str:
    return f"{ends[0]:,} to {ends[1]:,}" if ends[0] != ends[1] else f"{ends[0]:,}"
