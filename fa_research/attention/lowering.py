"""Bring what a layer asks (`AttentionSpec`) together with what a backend can do (`Capabilities`)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

import torch

from fa_research.masks import Band, Causal
from fa_research.spec import AttentionSpec, Capabilities

Check = tuple[bool, str]  # whether it holds, and the reason against the backend where it does not


class Kind(Enum):
    NATIVE = "native"
    REWRITTEN = "rewritten"
    UNSUPPORTED = "unsupported"


@dataclass(frozen=True, slots=True)
class Lowering:
    """How one spec runs on one backend.

    spec: what the backend is asked to run. chunk: when above 0, the batch is first cut into virtual requests of at most
    one chunk (`attention.local`). sink_epilogue: scale the output by `sigmoid(lse - sink)` after the backend
    (`attention.merge`). reasons: why it is unsupported.
    """

    spec: AttentionSpec
    chunk: int = 0
    sink_epilogue: bool = False
    reasons: tuple[str, ...] = ()

    @property
    def kind(self) -> Kind:
        if self.reasons:
            return Kind.UNSUPPORTED
        return Kind.REWRITTEN if self.chunk or self.sink_epilogue else Kind.NATIVE

    @property
    def rewrites(self) -> tuple[str, ...]:
        """Names of the rewrites, as they stand in the row."""
        names = (("chunks_as_requests", self.chunk > 0), ("sink_epilogue", self.sink_epilogue))
        return tuple(name for name, used in names if used)


def lower(
    spec: AttentionSpec,
    capabilities: Capabilities,
    *,
    page_size: int,
    dtype: torch.dtype,
    device: torch.device,
    kv_dtype: torch.dtype | None = None,
) -> Lowering:
    """Native if the backend does all of it, rewritten if an exact rewrite closes the gap, else unsupported with every
    reason."""
    reasons = _basic_reasons(spec, capabilities, page_size, dtype, device, kv_dtype)
    chunk, mask_reasons = _lower_mask(spec, capabilities, page_size)
    sink_epilogue = spec.has_sink and not capabilities.sinks
    if sink_epilogue and not capabilities.returns_lse:
        reasons.append("attention sinks: the kernel has none and returns no LSE to apply them afterwards")
    target = replace(spec, mask=Causal()) if chunk else spec
    if sink_epilogue:
        target = replace(target, has_sink=False)
    return Lowering(target, chunk=chunk, sink_epilogue=sink_epilogue, reasons=tuple(reasons + mask_reasons))


def _lower_mask(spec: AttentionSpec, capabilities: Capabilities, page_size: int) -> tuple[int, list[str]]:
    """The chunk size to rewrite with (0 = the mask is native) and the reasons why the mask cannot be served."""
    if "predicate" in capabilities.mask_features:
        return 0, []
    band = spec.mask.band()
    if band is None:
        return 0, [f"mask {spec.mask.name}: it is no band, and the kernel evaluates bands only"]
    missing = band.features - capabilities.mask_features
    if not missing:
        return 0, []
    if missing == {"chunk"} and band.features == {"causal", "chunk"}:
        return _chunk_rewrite(band, page_size)
    return 0, [f"mask {spec.mask.name}: the kernel lacks {', '.join(sorted(missing))}"]


def _chunk_rewrite(band: Band, page_size: int) -> tuple[int, list[str]]:
    if band.chunk % page_size:
        return 0, [
            f"mask chunked: as virtual requests, chunks of {band.chunk} tokens must start on a page border; "
            f"kv.page_size={page_size} does not divide it"
        ]
    return band.chunk, []


def _basic_reasons(
    spec: AttentionSpec,
    can: Capabilities,
    page_size: int,
    dtype: torch.dtype,
    device: torch.device,
    kv_dtype: torch.dtype | None,
) -> list[str]:
    name = str(dtype).removeprefix("torch.")
    checks = [
        (device.type in can.devices, f"device {device.type}: runs on {_list(can.devices)} only"),
        (name in can.dtypes, f"dtype {name}: takes {_list(can.dtypes)}"),
        *_cache_checks(spec, can, page_size, dtype, kv_dtype),
        *_layer_checks(spec, can),
    ]
    return [reason for ok, reason in checks if not ok]


def _cache_checks(
    spec: AttentionSpec,
    can: Capabilities,
    page_size: int,
    dtype: torch.dtype,
    kv_dtype: torch.dtype | None,
) -> list[Check]:
    given, own = (str(each).removeprefix("torch.") for each in (kv_dtype, dtype))
    return [
        (
            kv_dtype in (None, dtype) or can.own_kv_dtype,
            f"kv.dtype {given}: the kernel takes a cache in the dtype of the queries alone, {own}",
        ),
        (
            spec.layout in can.layouts,
            f"KV layout {spec.layout.value}: not among {_list(x.value for x in can.layouts)}",
        ),
        (
            page_size % can.page_size_multiple == 0,
            f"kv.page_size={page_size}: must be a multiple of {can.page_size_multiple}",
        ),
    ]


def _layer_checks(spec: AttentionSpec, can: Capabilities) -> list[Check]:
    checks = [
        (
            spec.v_head_dim == spec.head_dim or can.own_v_head_dim,
            f"value head dim {spec.v_head_dim}: the kernel has one head dim, that of the keys is {spec.head_dim}",
        ),
        (not spec.softcap or can.softcap, f"softcap={spec.softcap}: the kernel has none"),
    ]
    if can.head_dims is not None:
        for dim in sorted({spec.head_dim, spec.v_head_dim}):
            checks.append((dim in can.head_dims, f"head dim {dim}: takes {_dims(can.head_dims)}"))
    return checks


def _dims(dims: frozenset[int]) -> str:
    smallest, largest = min(dims), max(dims)
    if len(dims) > 5 and dims == set(range(smallest, largest + 1, smallest)):
        return f"multiples of {smallest} up to {largest}"
    return _list(dims)


def _list(items: object) -> str:
    return ", ".join(sorted(map(str, items), key=lambda text: (len(text), text)))  # type: ignore[call-overload]
