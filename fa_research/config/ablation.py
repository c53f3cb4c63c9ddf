"""Keys of attention that may be given beside `model.path`: they need no other weights, so a trained model can be
measured under another window. No torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from fa_research.config.model_schema import LocalConfig, ModelConfig

ABLATIONS = (
    "mask.name", "mask.size", "mask.options", "local.pattern", "local.mask.name", "local.mask.size",
    "local.mask.options", "local.rope_theta", "softcap",
)  # fmt: skip
# A size belongs to its mask: who names a mask means the size given with it, or none.
_WITH = {"mask.name": "mask.size", "local.mask.name": "local.mask.size"}


def leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys with their values; a list is a value, and so are the options of a mask."""
    for key, value in node.items():
        if isinstance(value, Mapping) and key != "options":
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def was_typed(key: str, overrides: Iterable[str]) -> bool:
    """Whether the overrides give this key, or a group that it is in."""
    typed = {override.lstrip("+").partition("=")[0] for override in overrides}
    parts = key.split(".")
    return any(".".join(parts[:n]) in typed for n in range(2, len(parts) + 1))


def given(model: Mapping[str, Any], overrides: Iterable[str] = ()) -> list[str]:
    """Those of `ABLATIONS` that `model`, as plain data and not yet read from its folder, sets: to other than the
    default, or among the overrides."""
    asked, default = dict(leaves(model)), dict(leaves(dataclasses.asdict(ModelConfig())))
    typed = tuple(overrides)
    keys = [
        key
        for key in ABLATIONS
        if key in asked
        # that a mask has no options needs no saying: no folder gives any
        and (asked[key] != default[key] or (asked[key] != {} and was_typed(f"model.{key}", typed)))
    ]
    return [key for key in ABLATIONS if key in {*keys, *(_WITH[key] for key in keys if key in _WITH)}]


def take_over(found: ModelConfig, model: ModelConfig, keys: Iterable[str]) -> None:
    """Set these keys of `found` to what `model` has. Where no layer is local any more, the folder's mask and rotation
    of such layers go too."""
    keys = list(keys)
    if "local.pattern" in keys and not any(model.local.pattern):
        found.local = LocalConfig()
    for key in keys:
        *groups, name = key.split(".")
        source: Any = model
        target: Any = found
        for group in groups:
            source, target = getattr(source, group), getattr(target, group)
        setattr(target, name, getattr(source, name))
