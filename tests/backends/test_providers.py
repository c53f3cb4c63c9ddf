"""Where flash-attention kernels come from: which packages are asked, and what is said when none is there."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fa_research.backends import BackendSettings, flash_attn
from fa_research.backends import flash_attn_providers as providers
from fa_research.backends.fa2 import FA2Backend
from fa_research.backends.fa3 import FA3Backend
from fa_research.backends.flash_attn import FlashAttnBackend
from fa_research.backends.flash_attn_providers import PROVIDERS, resolve
from fa_research.masks import SlidingWindow
from fa_research.metadata import FlashAttentionMetadata
from tests.helpers import make_spec

MODULES = {version: [p.module for p in PROVIDERS if version in p.versions] for version in (2, 3)}


def installed(module: str) -> bool:
    return importlib.util.find_spec(module.partition(".")[0]) is not None


def test_every_package_of_the_design_is_asked() -> None:
    assert MODULES[3] == ["flash_attn_interface", "sgl_kernel.flash_attn", "vllm.vllm_flash_attn", "kernels"]
    assert MODULES[2] == ["flash_attn", "vllm.vllm_flash_attn"]


@pytest.mark.parametrize(
    ("version", "pinned"), [(3, "nonsense"), (2, "nonsense"), (2, "kernels"), (3, "flash_attn")]
)
def test_an_unknown_provider_names_the_choices(version: int, pinned: str) -> None:
    provider, reasons = resolve(version, pinned)
    assert provider is None
    choices = ", ".join(MODULES[version])
    assert reasons == (f"backend.provider={pinned} is unknown for FA{version}; choose one of {choices}",)


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.skipif(any(map(installed, MODULES[2] + MODULES[3])), reason="a provider is installed")
def test_without_any_package_each_is_named(version: int) -> None:
    provider, reasons = resolve(version, None)
    assert provider is None and len(reasons) == len(MODULES[version])
    for module, reason in zip(MODULES[version], reasons, strict=True):
        assert reason.startswith(f"{module}: No module named")


@pytest.mark.parametrize(("version", "module"), [(3, "sgl_kernel.flash_attn"), (2, "flash_attn")])
def test_a_pinned_package_that_is_not_installed_is_the_only_reason(version: int, module: str) -> None:
    if installed(module):
        pytest.skip(f"{module} is installed")
    provider, reasons = resolve(version, module)
    assert provider is None and len(reasons) == 1 and reasons[0].startswith(f"{module}: ")


def test_a_generation_that_a_package_does_not_have() -> None:
    assert providers.FlashAttn.missing(3) == "flash_attn has no FA3"
    assert providers.SGLKernel.missing(2) == "sgl_kernel.flash_attn has no FA2"


def test_flash_attention_4_alone_is_no_flash_attention_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both live under the name `flash_attn`; what FlashAttention-4 installs there is a folder without `__init__.py`."""
    if installed("flash_attn"):
        pytest.skip("flash_attn is installed")
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    assert providers.FlashAttn.missing(2) == (
        "flash_attn: has no FlashAttention-2 in it (flash_attn.cute is FlashAttention-4)"
    )
    monkeypatch.delitem(sys.modules, "flash_attn")


@pytest.mark.parametrize(
    ("cls", "provider", "asked", "refused"),
    [
        (FA2Backend, providers.VLLM, {"num_splits": 4}, ["backend.num_splits=4"]),
        (FA2Backend, providers.VLLM, {"num_splits": 1}, []),
        (FA2Backend, providers.VLLM, {"deterministic": True}, []),
        (FA2Backend, providers.FlashAttn, {"num_splits": 1}, ["backend.num_splits=1"]),
        (FA2Backend, providers.FlashAttn, {"deterministic": True}, ["backend.deterministic=true"]),
        (FA2Backend, providers.FlashAttn, {}, []),
        (FA3Backend, providers.VLLM, {"num_splits": 4}, []),
        (FA3Backend, providers.VLLM, {"num_splits": 4, "deterministic": True}, ["backend.num_splits=4"]),
    ],
)
def test_splits_that_the_kernels_would_not_take_or_not_heed_are_refused(
    monkeypatch: pytest.MonkeyPatch,
    cls: type[FlashAttnBackend],
    provider: type[providers.Provider],
    asked: dict[str, Any],
    refused: list[str],
) -> None:
    """vLLM's FA2 raises above one split; flash-attn's takes no number of splits at all, and would ignore it."""
    monkeypatch.setattr(flash_attn, "resolve", lambda version, pinned: (provider, ()))
    monkeypatch.setattr(provider, "_load", lambda self: None)
    settings = BackendSettings(torch.device("cuda"), torch.bfloat16, 256, 4096, **asked)
    (lowering,) = cls(settings, [make_spec()]).lowerings
    assert [reason.partition(":")[0] for reason in lowering.reasons] == refused


@pytest.mark.parametrize(
    ("provider", "version"), [(providers.FlashAttn, 2), (providers.VLLM, 2), (providers.VLLM, 3)]
)
@pytest.mark.parametrize("return_lse", [False, True])
def test_flash_attn_packs_no_heads_where_the_lse_is_wanted(
    monkeypatch: pytest.MonkeyPatch, provider: type[providers.Provider], version: int, return_lse: bool
) -> None:
    """Its kernels leave the LSE of packed heads in another order than it is returned in; see the provider."""
    told: list[int] = []

    def flash_attn_varlen_func(q: torch.Tensor, *given: Any, **named: Any) -> object:
        told.append(named["max_seqlen_q"] if "max_seqlen_q" in named else given[4])
        return (q, torch.zeros(2, 3)) if return_lse else q

    module = SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func)
    monkeypatch.setattr(provider, "_load", lambda self: module)
    metadata = FlashAttentionMetadata.allocate(3, 32, 16, "cpu")  # a decode step: one query each
    arguments = providers.KernelArguments(1.0, True, (-1, -1), 0, 0.0, 0, return_lse)
    q, kv = torch.zeros(3, 2, 64), torch.zeros(7, 16, 1, 64)
    _, lse = provider(version).call(q, kv, kv, metadata, arguments, None, None)
    assert told == [2 if return_lse and provider is providers.FlashAttn else 1]
    assert (lse is not None and lse.shape == (3, 2)) == return_lse


@pytest.mark.gpu
@pytest.mark.parametrize("version", [2, 3])
def test_a_pin_takes_that_package(version: int) -> None:
    found, reasons = resolve(version, None)
    if found is None:
        pytest.skip("; ".join(reasons))
    assert resolve(version, found.module) == (found, ())
    kernels = found(version)
    assert kernels.module == found.module and torch.cuda.is_available()


FAULTY = [(96, 192, 128), (128, 128, 128), (192, 128, 96), (256, 128, 64)]  # head dim, rows, keys of a tile


@pytest.mark.parametrize(("head_dim", "rows", "keys"), FAULTY)
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 8, 16])
def test_windows_whose_queries_end_in_several_key_tiles_are_refused(
    head_dim: int, rows: int, keys: int, group: int
) -> None:
    """Against the mechanism itself, query by query: keys are counted from the first one that the tile's first query
    sees, and the causal mask is missing in all key tiles but the last. Two key tiles are right: the window's own mask
    is applied in the first one."""
    fault = providers.VLLM.window_fault
    assert fault is not None
    tiles = [{row // group for row in range(start, start + rows)} for start in range(0, rows * group, rows)]
    queries = max(len(tile) for tile in tiles)  # of several that share their KV head
    for window in range(1, 5 * keys):
        last_keys = [window - 1 + query for query in range(queries)]
        last_tile = last_keys[-1] // keys
        unmasked = [key for key in last_keys if key // keys < last_tile and (key + 1) % keys]
        assert fault.affects(head_dim, group, window) == (bool(unmasked) and last_tile >= 2), window


def test_what_is_right_of_windows_is_not_refused() -> None:
    """What real models ask: gpt-oss, Mistral, Gemma 2 and 3; and no window at all."""
    fault = providers.VLLM.window_fault
    assert fault is not None
    for head_dim, group, window in ((64, 8, 128), (128, 4, 4096), (256, 2, 4096), (256, 4, 512), (128, 4, 0)):
        assert not fault.affects(head_dim, group, window)
    assert fault.affects(128, 4, 2047)  # Phi-3-medium-4k


@pytest.mark.parametrize(
    ("provider", "version", "refused"), [(providers.VLLM, 3, True), (providers.VLLM, 2, False)]
)
def test_the_row_says_why_a_window_is_refused(
    monkeypatch: pytest.MonkeyPatch, provider: type[providers.Provider], version: int, refused: bool
) -> None:
    monkeypatch.setattr(flash_attn, "resolve", lambda version, pinned: (provider, ()))
    monkeypatch.setattr(provider, "_load", lambda self: None)
    cls = FA3Backend if version == 3 else FA2Backend
    settings = BackendSettings(torch.device("cuda"), torch.bfloat16, 16, 4096)
    spec = make_spec((40, 10), 128, SlidingWindow(2047))
    (lowering,) = cls(settings, [spec]).lowerings
    assert len(lowering.reasons) == refused
    if refused:
        assert "mask sliding_window of 2047 tokens" in lowering.reasons[0]
