"""Questions whose answers change the result: they are weighed by quality against time, never by time alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fa_research.compare.cells import Cell
from fa_research.compare.reading import is_number

QUALITY = ("bits_per_byte", "top1_agreement")
_MORE_IS_BETTER = {"bits_per_byte": False, "top1_agreement": True}


@dataclass(frozen=True)
class Tradeoff:
    """One answer in a cell: its number (a time, say), and its quality by metric."""

    label: str
    value: float
    quality: Mapping[str, float]


def tradeoffs(cell: Cell) -> list[Tradeoff]:
    """The answers of a cell that have a number and a quality."""
    found = []
    for label, number in cell.measured.items():
        metrics = cell.entries[label].record.row.metrics
        quality = {name: float(v) for name in QUALITY if is_number(v := metrics.get(name))}
        if quality:
            found.append(Tradeoff(label, number.value, quality))
    return found


def measure_of(points: Sequence[Tradeoff]) -> str | None:
    """The quality that all of them have, bits per byte first; None where there is none."""
    return next((name for name in QUALITY if points and all(name in p.quality for p in points)), None)


def pareto(points: Sequence[Tradeoff], quality: str, *, higher: bool) -> list[Tradeoff]:
    """The points that no other is at least as good as in both, and better than in one; the fastest first.

    higher: whether more of the number is better.
    """
    sign = 1 if _MORE_IS_BETTER[quality] else -1

    def goods(point: Tradeoff) -> tuple[float, float]:
        return (point.value if higher else -point.value, sign * point.quality[quality])

    def is_beaten(point: Tradeoff) -> bool:
        mine = goods(point)
        return any(
            other is not mine and all(a >= b for a, b in zip(other, mine, strict=True)) and other != mine
            for other in map(goods, points)
        )

    kept = [point for point in points if not is_beaten(point)]
    return sorted(kept, key=lambda point: point.value, reverse=higher)
