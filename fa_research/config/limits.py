"""Ranges of single values, as problems that name the key. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from fa_research.errors import ConfigError


def at_least(key: str, value: float | None, least: int) -> Iterator[str]:
    if value is not None and not value >= least:
        yield f"{key}={value}: must be at least {least}"


def positive(key: str, value: float | None) -> Iterator[str]:
    if value is not None and not (value > 0 and math.isfinite(value)):
        yield f"{key}={value}: must be a finite number above 0"


def zero_or_positive(key: str, value: float) -> Iterator[str]:
    if not (value >= 0 and math.isfinite(value)):
        yield f"{key}={value}: must be 0 (off) or a positive number"


def require(sizes: Mapping[str, int], least: int = 1) -> None:
    """For constructors, which meet values that no config was checked for. Raises ConfigError that names the first of
    `sizes` that is below `least`."""
    for key, value in sizes.items():
        if value < least:
            raise ConfigError(f"{key}={value}: must be at least {least}")
