"""RoPE in a config.json: today's `rope_parameters`, and the `rope_theta` with `rope_scaling` of older files. No torch.

What only the whole config.json knows (lengths whose ratio is the factor) is put into the fields of `RopeScaling`, so
that a rotation can be computed from these alone. The rules are those of `modeling_rope_utils` of transformers 5.23.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fa_research.config.hf_families import Family
from fa_research.config.hf_reader import Reader
from fa_research.config.model_schema import RopeScaling, RopeType

_LENGTH = "original_max_position_embeddings"
_EVERY_TYPE = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
# Name of the type -> the keys that it reads; transformers ignores others with a warning, here they are refused.
_KEYS: dict[str, set[str]] = {
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", _LENGTH},
    "yarn": {
        "factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate", _LENGTH,
        "finetuned",  # of the first YaRN checkpoints; says nothing about the rotation
    },
    "longrope": {"factor", "attention_factor", "short_factor", "long_factor", _LENGTH},
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Rope:
    theta: float
    scaling: RopeScaling
    local_theta: float | None = None  # of the windowed layers, where they have a rotation of their own


def read_rope(reader: Reader, family: Family) -> Rope:
    """What is not supported goes to the reader's problems."""
    if family.local_rope_theta is not None:
        return _nested(reader, family, family.local_rope_theta)
    table = reader.table("rope_scaling") or reader.table("rope_parameters")
    if reader.raw.get("rope_parameters") is None:  # an empty one asks for no scaling
        table = table or family.rope_scaling or {}
    theta, scaling = _rotation(reader, family, table, _theta(reader, family))
    return Rope(theta, scaling)


def context_len(max_position: int, scaling: RopeScaling) -> int:
    """Tokens that the model was made for. `max_position_embeddings` is the length before a dynamic scaling, and before
    or after a YaRN one; vLLM takes the product too."""
    if scaling.type in (RopeType.dynamic, RopeType.yarn):
        return max(max_position, int(scaling.original_max_position * scaling.factor))
    return max_position


def _theta(reader: Reader, family: Family) -> float:
    return reader.number("rope_theta", family.rope_theta)


def _nested(reader: Reader, family: Family, local_default: float) -> Rope:
    """A table for each kind of layer; `rope_scaling` of older files is that of the full layers."""
    tables = reader.table("rope_parameters")
    for key in sorted(tables.keys() - {"full_attention", "sliding_attention"}):
        reader.problems.append(f"rope_parameters.{key}={json.dumps(tables[key])} is not supported")
    kinds = Reader(tables, "rope_parameters.", reader.problems)
    scaled = reader.table("rope_scaling")
    if "rope_type" not in scaled and scaled.get("type", "default") != "default":
        # transformers updates a table whose rope_type is default already, and then does not look at type
        reader.problems.append(
            f"rope_scaling.type={json.dumps(scaled['type'])} is not supported; name it rope_type"
        )
    full = {**kinds.table("full_attention"), **scaled}
    theta, scaling = _rotation(reader, family, full, _theta(reader, family))
    local = kinds.table("sliding_attention")
    local_theta, local_scaling = _rotation(
        reader, family, local, reader.number("rope_local_base_freq", local_default)
    )
    if local_scaling.type is not RopeType.none:
        reader.problems.append(
            f"RoPE of type {local_scaling.type} for sliding_attention is not supported; default is"
        )
    return Rope(theta, scaling, local_theta)


def _rotation(
    reader: Reader, family: Family, raw_table: Mapping[str, Any], theta: float
) -> tuple[float, RopeScaling]:
    """One table; `theta` where it has none."""
    table = Reader(raw_table, "rope_scaling.", reader.problems)
    theta = table.number("rope_theta", theta)
    partial = raw_table.get("partial_rotary_factor", reader.raw.get("partial_rotary_factor"))
    if partial not in (None, 1):
        reader.problems.append(f"partial_rotary_factor={json.dumps(partial)} is not supported; only 1 is")
    name = raw_table.get("rope_type", raw_table.get("type", "default"))
    name = "longrope" if name in family.longrope_names else name
    if name not in list(_KEYS):  # of a list, because any JSON can be asked for in it
        reader.problems.append(
            f"rope_scaling: RoPE of type {json.dumps(name)} is not supported; supported are {', '.join(_KEYS)}"
        )
        return theta, RopeScaling()
    if family.rope_types is not None and name not in family.rope_types:
        reader.problems.append(
            f"rope_scaling: RoPE of type {name} is not supported for this architecture; "
            f"{' and '.join(family.rope_types)} are"
        )
    for key in sorted(raw_table.keys() - _EVERY_TYPE - _KEYS[name]):
        table.refuse(key, f" with RoPE of type {name}")
    return theta, _scaling(name, table, reader, family)


def _scaling(name: str, table: Reader, reader: Reader, family: Family) -> RopeScaling:
    longest = reader.whole("max_position_embeddings")
    match name:
        case "linear":
            return RopeScaling(RopeType.linear, table.number("factor"))
        case "dynamic":
            return RopeScaling(RopeType.dynamic, table.number("factor"), longest)
        case "llama3":
            original = _original_length(table, reader, family, longest)
            low, high = table.number("low_freq_factor"), table.number("high_freq_factor")
            return RopeScaling(RopeType.llama3, table.number("factor"), original, low, high)
        case "yarn":
            if family.local_rope_theta is not None and not table.raw.get("truncate", True):
                table.refuse(
                    "truncate", " in the table of a kind of layer, where transformers does not read it"
                )
            return _yarn(table, _original_length(table, reader, family, longest), longest)
        case "longrope":
            return _longrope(table, _original_length(table, reader, family, longest), longest)
        case _:
            return RopeScaling()


def _original_length(table: Reader, reader: Reader, family: Family, longest: int) -> int:
    """Beside the table it comes first, as in transformers, which does not look for it there where each kind of layer
    has a table."""
    nested = family.local_rope_theta is not None
    if not nested and (reader.raw.get(_LENGTH) is not None or family.original_max_position is not None):
        return reader.whole(_LENGTH, family.original_max_position)
    return table.whole(_LENGTH, longest)


def _yarn(table: Reader, original: int, longest: int) -> RopeScaling:
    ratio = (
        longest / original if "factor" in table.raw else None
    )  # null asks for the ratio, as in transformers
    return RopeScaling(
        RopeType.yarn,
        factor=table.number("factor", ratio),
        original_max_position=original,
        beta_fast=table.number("beta_fast", 32.0) or 32.0,
        beta_slow=table.number("beta_slow", 1.0) or 1.0,
        truncate=table.flag("truncate", "truncate" not in table.raw),  # null is false, as in transformers
        mscale=table.optional("mscale"),
        mscale_all_dim=table.optional("mscale_all_dim"),
        attention_factor=table.optional("attention_factor"),
    )


def _longrope(table: Reader, original: int, longest: int) -> RopeScaling:
    return RopeScaling(
        RopeType.longrope,
        factor=table.number("factor", longest / original),
        original_max_position=original,
        attention_factor=table.optional("attention_factor"),
        short_factor=table.numbers("short_factor"),
        long_factor=table.numbers("long_factor"),
    )
