"""Names, units and numbers in words."""

from __future__ import annotations

from fa_research.tracking.columns import format_value

_UNITS = (("_tokens_per_s", "tokens/s"), ("_GB_per_s", "GB/s"), ("_TFLOP_per_s", "TFLOP/s"), ("_us", "us"))
# Axes of figures, by the last part of a key.
_AXES = {
    "context_len": "context (tokens)",
    "length": "length (tokens)",
    "new_len": "new tokens per request",
    "prefix_len": "cached prefix (tokens)",
    "prompt_len": "prompt (tokens)",
    "batch_size": "batch size (requests)",
    "page_size": "page size (slots)",
}


def unit(metric: str) -> str:
    """The unit that a metric's name ends with, or nothing."""
    return next((text for ending, text in _UNITS if f"_{metric}".endswith(ending)), "")


def quantity(metric: str) -> str:
    """A metric's name as words with its unit: decode step (us)."""
    ending = next((ending for ending, _ in _UNITS if f"_{metric}".endswith(ending)), "")
    name = f"_{metric}".removesuffix(ending).strip("_").replace("_", " ")
    return f"{name} ({unit(metric)})" if unit(metric) else name


def words(metric: str) -> str:
    """A metric's name as words without its unit: decode step."""
    return quantity(metric).partition(" (")[0]


def axis_title(key: str) -> str:
    """A key as the title of an axis, with its unit where it is known."""
    last = key.removesuffix(".name").rpartition(".")[2]
    return _AXES.get(last, last.replace("_", " "))


def number(value: float) -> str:
    return format_value(float(value))


def percent(fraction: float) -> str:
    """A difference in percent, to a tenth up to ten percent: 1.8 %."""
    return f"{fraction * 100:.1f} %" if abs(fraction) < 0.1 else f"{fraction * 100:,.0f} %"
