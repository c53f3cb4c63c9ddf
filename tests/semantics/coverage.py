"""What each backend is tested on: every pair of values that it supports, and, where it supports none, its own."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch

from fa_research import backends
from fa_research.backends import BackendSettings
from fa_research.masks import Causal
from fa_research.spec import AttentionSpec, Capabilities
from tests.helpers import make_spec
from tests.semantics.cases import LENS, Case, dimensions, every_mask, said
from tests.semantics.covering import Row, covering

Values = Mapping[str, Sequence[Any]]  # of each field of a `Case`
Options = tuple[tuple[str, Any], ...]  # of the backend; a tuple, to be a key
LAYER = ("heads", "head_dim", "mask", "softcap", "has_sink")
ALL = "FA_RESEARCH_FULL_SEMANTICS"  # set: on the CPU too, every mask with every page size and every batch


@dataclass(frozen=True)
class Coverage:
    """One backend on one device.

    unavailable: why it does not run here at all. capabilities: its own, where it runs. cases: what it is tested on.
    untested: values that it refuses, or that were replaced by its own, and why. refused: reasons against pairs of
    values each of which it takes with others.
    """

    title: str
    unavailable: tuple[str, ...] = ()
    capabilities: Capabilities | None = None
    cases: tuple[Case, ...] = ()
    untested: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.unavailable:
            return f"does not run here: {'; '.join(self.unavailable)}"
        parts = [f"not tested: {'; '.join(self.untested)}"] if self.untested else []
        parts += [f"some pairs of values refused: {'; '.join(self.refused)}"] if self.refused else []
        return "; ".join(parts) or "every pair of values"


@cache
def coverage(backend: str, device: str, options: Options = ()) -> Coverage:
    """Raises what the methods of the backend raise."""
    asked = dimensions(device)
    title, with_ = f"{backend} on {device}", "".join(f" {key}={value}" for key, value in options)
    if device == "cuda" and not torch.cuda.is_available():
        return Coverage(title, ("needs a CUDA device, torch sees none",))
    unavailable, capabilities = _capabilities(backend, device, asked, options)
    if capabilities is None:
        return Coverage(title, unavailable)
    if device not in capabilities.devices:
        return Coverage(title, (f"runs on {', '.join(sorted(capabilities.devices))} only",))
    values = {**asked, **_own_values(asked, capabilities)}
    reasons = _reasons(backend, device, values, options)
    supported = [row for row, against in reasons if not against]
    cases = [Case(**row) for row in covering(values, _full(device), supported)]
    if device == "cuda":
        cases += [case for case in _most_run(supported) if case not in cases]
    untested = (*every_mask(device)[1], *_replaced(asked, values), *_impossible(values, reasons))
    return Coverage(
        f"{backend}{with_} on {device}",
        (),
        capabilities,
        tuple(cases),
        untested,
        _refused_pairs(values, reasons),
    )


def _capabilities(
    backend: str, device: str, values: Values, options: Options
) -> tuple[tuple[str, ...], Capabilities | None]:
    """What it can do, or, where it runs with no dtype and page size, why."""
    every: list[tuple[str, ...]] = []
    for dtype, page_size in itertools.product(values["dtype"], values["page_size"]):
        settings = _settings(device, dtype, page_size, options)
        every.append(backends.reasons_against(backend, settings, ()))
        if not every[-1]:
            return (), backends.create(backend, settings, ()).capabilities
    return _cause(every), None


def runnable(names: Sequence[str], device: str) -> list[str]:
    """Those of the backends that run on the device."""
    return [name for name in names if (found := _or_none(name, device)) and not found.unavailable]


def parameters(
    names: Sequence[str], options: Options = (), devices: Sequence[str] = ("cpu", "cuda")
) -> list[Any]:
    """(name, device, case) for `parametrize`."""
    cases = {
        device: [
            (name, case)
            for name in names
            if (found := _or_none(name, device, options))
            for case in found.cases
        ]
        for device in devices
    }
    return marked(cases)


def marked(found: Mapping[str, Sequence[tuple[Any, ...]]]) -> list[Any]:
    """(first, device, others) of each device for `parametrize`; one placeholder is skipped where there is no GPU."""
    params = []
    for device, each in found.items():
        marks = [pytest.mark.gpu] if device == "cuda" else []
        if device == "cuda" and not torch.cuda.is_available():
            params.append(pytest.param("", device, None, id="cuda-all", marks=marks))
        params += [
            pytest.param(name, device, case, id=f"{name}-{device}-{case}", marks=marks) for name, case in each
        ]
    return params


def _or_none(name: str, device: str, options: Options = ()) -> Coverage | None:
    """None where methods of the backend raise: the test of its coverage raises it again, and fails."""
    try:
        return coverage(name, device, options)
    except Exception:
        return None


def _full(device: str) -> tuple[str, ...]:
    """Dimensions whose every combination is run. On the GPU kernels choose their path by mask and page size."""
    if device == "cuda":
        return ("mask", "page_size")
    return ("mask", "page_size", "batch") if os.environ.get(ALL, "0") not in ("", "0") else ()


def _settings(device: str, dtype: torch.dtype, page_size: int, options: Options) -> BackendSettings:
    return BackendSettings(torch.device(device), dtype, page_size, 16384, options=dict(options))


def _own_values(values: Values, can: Capabilities) -> dict[str, Sequence[Any]]:
    """Values of the backend's own for the dimensions of which it takes none."""
    own: dict[str, Sequence[Any]] = {}
    if not any(said(dtype) in can.dtypes for dtype in values["dtype"]):
        own["dtype"] = tuple(getattr(torch, dtype) for dtype in sorted(can.dtypes))
    if can.head_dims is not None and not can.head_dims & set(values["head_dim"]):
        own["head_dim"] = tuple(sorted({min(can.head_dims), max(can.head_dims)}))
    multiple = can.page_size_multiple
    if all(size % multiple for size in values["page_size"]):
        own["page_size"] = (multiple, 2 * multiple)
    return own


def _reasons(
    backend: str, device: str, values: Values, options: Options
) -> list[tuple[Row, tuple[str, ...]]]:
    """Every combination that a backend may refuse, with its reasons: all but the batch, which backends are not told."""
    found = []
    layers = [dict(zip(LAYER, each, strict=True)) for each in itertools.product(*(values[n] for n in LAYER))]
    for dtype, page_size in itertools.product(values["dtype"], values["page_size"]):
        settings = _settings(device, dtype, page_size, options)
        general = backends.reasons_against(backend, settings, ())
        made = None if general else backends.create(backend, settings, ())
        plain: dict[AttentionSpec, tuple[str, ...]] = {}  # a scene has a layer of plain causal attention too
        for layer in layers:
            against = general
            if made is not None:
                beside = make_spec(layer["heads"], layer["head_dim"])
                if beside not in plain:
                    plain[beside] = made.lower(beside).reasons
                against = tuple(dict.fromkeys((*plain[beside], *made.lower(make_spec(**layer)).reasons)))
            found.append(({**layer, "page_size": page_size, "dtype": dtype}, against))
    return found


def _most_run(supported: Sequence[Row]) -> list[Case]:
    """What is run most, on each page size and batch: kernels choose their path by them."""
    common = {
        "mask": Causal(),
        "softcap": 0.0,
        "has_sink": False,
        "head_dim": 128,
        "heads": (8, 2),
        "dtype": torch.bfloat16,
    }
    rows = [row for row in supported if common.items() <= row.items()]
    return [Case(batch=batch, **row) for row in rows for batch in LENS["cuda"]]


def _replaced(asked: Values, values: Values) -> list[str]:
    return [
        f"{name} {_list(asked[name])} (its own in their place: {_list(values[name])})"
        for name in values
        if values[name] != asked[name]
    ]


def _impossible(values: Values, reasons: Sequence[tuple[Row, tuple[str, ...]]]) -> list[str]:
    """Values in no combination that the backend takes, by the reason against them."""
    found: dict[str, None] = {}
    for name in reasons[0][0]:
        for value in values[name]:
            against = [why for row, why in reasons if row[name] == value]
            if all(against):
                found[f"{name} {said(value)} ({'; '.join(_cause(against))})"] = None
    return list(found)


def _refused_pairs(values: Values, reasons: Sequence[tuple[Row, tuple[str, ...]]]) -> tuple[str, ...]:
    taken = [row for row, why in reasons if not why]
    possible = {name: {row[name] for row in taken} for name in reasons[0][0]}
    found: dict[str, None] = {}
    for a, b in itertools.combinations(reasons[0][0], 2):
        together = {(row[a], row[b]) for row in taken}
        for x, y in itertools.product(values[a], values[b]):
            if x in possible[a] and y in possible[b] and (x, y) not in together:
                found.update(
                    dict.fromkeys(_cause([why for row, why in reasons if (row[a], row[b]) == (x, y)]))
                )
    return tuple(found)


def _cause(against: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """What all of these refusals have in common, or else the shortest."""
    shared = tuple(reason for reason in against[0] if all(reason in each for each in against))
    return shared or min(against, key=len)


def _list(values: Sequence[Any]) -> str:
    return ", ".join(map(said, values))
