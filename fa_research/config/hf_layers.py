"""Which layers of a config.json see less than all keys, as `model.mask` and `model.local`. No torch."""

from __future__ import annotations

from fa_research.config.hf_families import Family
from fa_research.config.hf_reader import Reader
from fa_research.config.model_schema import LocalConfig, MaskConfig

_KINDS = {"full_attention": False, "sliding_attention": True}


def read_masks(
    reader: Reader, family: Family, num_layers: int, local_rope_theta: float | None
) -> tuple[MaskConfig, LocalConfig]:
    """The mask of most layers, and what the local ones have instead. Layers that are all alike need no second kind."""
    windowed = _windowed(reader, family, num_layers)
    if not any(windowed):
        return MaskConfig(), LocalConfig()
    absent = family.sliding_window if "sliding_window" not in reader.raw else None
    window = MaskConfig("sliding_window", reader.whole("sliding_window", absent))
    if all(windowed):
        return window, LocalConfig()
    return MaskConfig(), LocalConfig(_shortest_cycle(windowed), window, local_rope_theta)


def _windowed(reader: Reader, family: Family, num_layers: int) -> list[bool]:
    """For each layer, whether it has a window."""
    by_rule = _by_rule(reader, family, num_layers)
    listed = reader.raw.get("layer_types")
    if listed is None:
        return by_rule
    if (
        not isinstance(listed, list)
        or len(listed) != num_layers
        or not all(kind in list(_KINDS) for kind in listed)
    ):
        reader.refuse("layer_types", f"; give one of {' and '.join(_KINDS)} for each of {num_layers} layers")
        return by_rule
    windowed = [_KINDS[kind] for kind in listed]
    if not family.layer_types and windowed != by_rule:
        kind = "sliding_attention" if all(by_rule) else "full_attention"
        reader.refuse("layer_types", f" by this architecture other than {kind} for every layer")
    if any(windowed) and not _switched_on(reader, family):
        reader.refuse("layer_types", " without use_sliding_window")
    return windowed


def _by_rule(reader: Reader, family: Family, num_layers: int) -> list[bool]:
    layers = range(num_layers)
    window = reader.raw.get("sliding_window", family.sliding_window)
    on = _switched_on(reader, family) and window is not None
    match family.windows:
        case "all":
            return [on] * num_layers
        case "last":
            first = 0 if reader.raw.get("max_window_layers") == 0 else reader.whole("max_window_layers", 28)
            return [on and i >= first for i in layers]
        case "period":
            key = "sliding_window_pattern"
            period = reader.whole(key, family.period) if key in family.reads else family.period
            return [(i + 1) % period != 0 for i in layers]
        case _:
            return [False] * num_layers


def _switched_on(reader: Reader, family: Family) -> bool:
    return reader.flag("use_sliding_window") if family.window_switch else True


def _shortest_cycle(layers: list[bool]) -> list[bool]:
    """The shortest list that, repeated, begins with `layers`."""
    lengths = range(1, len(layers) + 1)
    return next(layers[:n] for n in lengths if all(layers[i] == layers[i % n] for i in range(len(layers))))
