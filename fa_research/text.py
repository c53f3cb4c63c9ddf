"""Words for a reader: counts with their nouns, bytes and times in units of a fitting size."""

from __future__ import annotations


def plural(count: int, noun: str, many: str | None = None) -> str:
    """A count with its noun, as in `1 page` and `2,000 pages`; `many` for nouns whose plural takes more than an s."""
    return f"{count:,} {noun if count == 1 else many or noun + 's'}"


def in_bytes(count: float) -> str:
    """Bytes with three digits, as in `1.5 GiB`."""
    size, *larger = "B", "KiB", "MiB", "GiB", "TiB"
    for unit in larger:
        if count < 1000:
            break
        count, size = count / 1024, unit
    return f"{_three_digits(count)} {size}"


def in_seconds(microseconds: float) -> str:
    """A time with three digits, as in `18.1 ms`."""
    for unit, factor in (("us", 1.0), ("ms", 1e3)):
        if abs(microseconds) < 1000 * factor:
            return f"{_three_digits(microseconds / factor)} {unit}"
    return f"{_three_digits(microseconds / 1e6)} s"


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
