"""The fields of a mask, from `model.mask.size` and `model.mask.options`."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any

from fa_research.masks.base import Mask

_KINDS: dict[type, str] = {int: "an integer", float: "a number", bool: "true or false", str: "text"}


def problem(cls: type[Mask]) -> str | None:
    """Why a config cannot build this mask, in one line."""
    where = f"mask {cls.name} ({cls.__module__}.{cls.__qualname__})"
    if "__dataclass_params__" not in vars(cls) or not vars(cls)["__dataclass_params__"].frozen:
        return f"{where} is no frozen dataclass, so a spec that holds it has no hash; write @dataclass(frozen=True)"
    try:
        kinds = typing.get_type_hints(cls)
    except Exception as error:  # a name that its module does not have
        return f"{where}: the types of its fields cannot be read: {error}"
    for field in _fields(cls).values():
        if kinds[field.name] not in _KINDS:
            return f"{where}: the field {field.name} is of type {field.type}; a config gives int, float, bool or str"
    return None


def arguments(cls: type[Mask], size: int | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """What to make the mask of. Raises ValueError for a field that it does not have, one that is missing, and a value
    of another type."""
    known, said = _fields(cls), f"mask name={cls.name}"
    if "size" in options:
        raise ValueError(
            f"{said}: options.size={options['size']}: give size={options['size']} beside the name"
        )
    if size is not None and "size" not in known:
        raise ValueError(f"{said} takes no size, got size={size}")
    others = [name for name in known if name != "size"]
    for name in options:
        if name not in others:
            raise ValueError(f"{said}: options.{name} is unknown; its options: {', '.join(others) or 'none'}")
    given = {**({} if size is None else {"size": size}), **options}
    for name, field in known.items():
        if name not in given and field.default is MISSING and field.default_factory is MISSING:
            how = "size (tokens), for instance size=1024" if name == "size" else f"options.{name}"
            raise ValueError(f"{said} needs {how}")
    kinds = typing.get_type_hints(cls)
    return {name: _of_kind(value, kinds[name], f"{said}: options.{name}") for name, value in given.items()}


def _fields(cls: type[Mask]) -> dict[str, Field[Any]]:
    return {field.name: field for field in fields(cls) if field.init} if is_dataclass(cls) else {}


def _of_kind(value: Any, kind: type, key: str) -> Any:
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ValueError(f"{key.replace('options.size', 'size')}={value}: expected {_KINDS[kind]}")
    return value
