"""Counts, bytes and times as a reader meets them."""

from __future__ import annotations

from fa_research.text import in_bytes, in_seconds, plural


def test_one_has_no_plural() -> None:
    assert [plural(n, "page") for n in (0, 1, 2000)] == ["0 pages", "1 page", "2,000 pages"]
    assert [plural(n, "match", "matches") for n in (1, 2)] == ["1 match", "2 matches"]


def test_units_fit() -> None:
    sizes = 1, 999, 1000, 1536, 2**20 * 123, 2**30 * 1.5, 2**50
    wanted = ["1 B", "999 B", "0.977 KiB", "1.5 KiB", "123 MiB", "1.5 GiB", "1,024 TiB"]
    assert [in_bytes(size) for size in sizes] == wanted
    times = 0.5, 18.1, 999, 18100, 198_978, 2.5e6, 2.5e9
    assert [in_seconds(t) for t in times] == [
        "0.5 us", "18.1 us", "999 us", "18.1 ms", "199 ms", "2.5 s", "2,500 s"
    ]  # fmt: skip
