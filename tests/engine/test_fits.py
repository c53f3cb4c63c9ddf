"""A cell that cannot fit is refused before anything is built, and one that could fit never is."""

from __future__ import annotations

import dataclasses
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir

from fa_research import workloads
from fa_research.config import Config, Level, ModelConfig, MoEConfig, load_config, to_plain
from fa_research.config.model_schema import LocalConfig
from fa_research.config.sizes import least_memory, least_work
from fa_research.config.store import choices, register
from fa_research.engine.fits import check_fits
from fa_research.errors import DoesNotFit, Refusal
from fa_research.kv_cache.host_memory import free_host_bytes
from fa_research.models import Decoder
from fa_research.runner import build_cell, run_cell
from fa_research.tracking import Status, failed_row
from tests.workloads.cells import LEVELS, WORKLOADS, cell, model_config

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


@contextmanager
def room(num_bytes: int) -> Iterator[None]:
    """A process that can get no more than about `num_bytes` of address space."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    lines = Path("/proc/self/status").read_text().splitlines()
    used = next(line for line in lines if line.startswith("VmSize"))
    limit = int(used.split()[1]) * 1024 + num_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def large(batch_size: int, **changes: Any) -> Config:
    """A decode cell whose pool is 4 MiB a request."""
    config = cell("decode")
    config.model = model_config(max_context_len=8192, **changes)
    workload = config.workload
    workload.batch_size, workload.context_len, workload.length_spread = batch_size, 2000, 0.0  # type: ignore[attr-defined]
    return config


def on_meta(model: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of a model's weights and tables, without making them."""
    decoder = Decoder(model, dtype=dtype, device="meta")
    return sum(t.nbytes for t in [*decoder.parameters(), *decoder.buffers()])


VARIANTS = {
    "plain": {},
    "tied": {"tie_word_embeddings": True, "qk_norm": True},
    "biased": {"qkv_bias": True, "o_bias": True, "sink": True, "post_norms": True},
    "moe": {"moe": MoEConfig(num_experts=4, bias=True)},
    "local": {"local": LocalConfig([True, False], rope_theta=1e4)},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("on_gpu", [False, True])
def test_weights_are_counted_to_the_byte(variant: str, on_gpu: bool) -> None:
    config = cell("decode")
    config.model = model_config(**VARIANTS[variant])
    need = least_memory(config, on_gpu)
    assert need is not None
    assert need.weights == on_meta(config.model, torch.bfloat16 if on_gpu else torch.float32)


def test_weights_of_every_model_that_comes_along() -> None:
    register()
    names = [name for name in choices("model") if name not in ("pybyte", "hf")]
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        for name in names:
            config = load_config(compose("config", [f"model={name}", "workload=decode"]))
            need = least_memory(config, on_gpu=True)
            assert need is not None and need.weights == on_meta(config.model, torch.bfloat16), name


@pytest.mark.parametrize("name", WORKLOADS)
@pytest.mark.parametrize("level", LEVELS, ids=str)
def test_the_workload_is_no_larger_than_it_asks_for(name: str, level: Level) -> None:
    config = cell(name, level)
    needs, work = workloads.create(config).needs(), least_work(config)
    assert work is not None
    assert (work.requests, work.longest) == (len(needs.seq_lens), max(needs.seq_lens))
    assert work.pages <= needs.pages(config.kv.page_size) <= 1.5 * work.pages
    assert work.tokens <= needs.tokens_per_pass


def test_pool_and_table_are_those_that_are_built() -> None:
    config = large(batch_size=2)
    need, (_, engine) = least_memory(config, on_gpu=False), build_cell(config)
    assert need is not None
    assert need.pool == engine.cache.kv.num_bytes
    assert need.table == engine.runner.req_to_token_RW.nbytes


def test_near_the_border_what_fits_runs_and_what_does_not_is_refused(tmp_path: Path) -> None:
    config = large(batch_size=64)  # 256 MiB
    need = least_memory(config, on_gpu=False)
    assert need is not None and need.pool > 2**27
    run_cell(
        cell("decode"), resolved={}, output_dir=tmp_path, multirun=True
    )  # its threads and buffers are there
    total = need.device + need.host
    with room(total - 2**20), pytest.raises(DoesNotFit):
        check_fits(config, CPU)
    with room(total + 2**20):
        check_fits(config, CPU)
    with room(total + 2**28):
        row = run_cell(config, resolved=to_plain(config), output_dir=tmp_path, multirun=True)
    assert row.status is Status.ok


def test_the_size_that_would_fit_is_named_and_does_fit() -> None:
    config = large(batch_size=100_000)
    with room(2**29):
        with pytest.raises(DoesNotFit) as refused:
            build_cell(config)
        said = str(refused.value)
        assert "workload.batch_size=100000" in said and "KV pool" in said and "weights" in said, said
        largest = int(said.split("workload.batch_size=")[2].split()[0])
        assert 100 < largest < 200  # of 4 MiB each, in 512 MiB
        check_fits(large(largest - 1), CPU)
    assert failed_row(refused.value).status is Status.oom


@pytest.mark.parametrize("name", ["decode", "extend", "mixed", "text"])
def test_ten_million_requests_are_refused_without_a_list_of_them(name: str) -> None:
    config = cell(name)
    key = "decode_requests" if name == "mixed" else "batch_size"
    setattr(config.workload, key, 10**13)  # no list of so many could be made
    with pytest.raises(DoesNotFit, match=rf"at most workload\.{key}=\d+ could fit"):
        build_cell(config)


def test_a_model_that_does_not_fit_is_told_from_a_batch() -> None:
    config = large(batch_size=1, num_layers=40, hidden_size=65536, intermediate_size=65536)
    with pytest.raises(DoesNotFit, match=r"no workload\.batch_size fits: take a smaller model"):
        build_cell(config)


def test_a_pool_that_was_asked_for_is_named() -> None:
    config = large(batch_size=1)
    config.kv = dataclasses.replace(config.kv, num_pages=10**12)
    with pytest.raises(DoesNotFit, match=r"lower kv\.num_pages=1000000000000"):
        build_cell(config)


def test_what_the_backend_refuses_comes_before_what_does_not_fit() -> None:
    config = large(batch_size=10**9)
    config.backend = dataclasses.replace(config.backend, name="fa3")
    with pytest.raises(Refusal):
        build_cell(config)


def test_the_host_has_a_limit() -> None:
    assert 0 < free_host_bytes() < 2**50
    with room(2**28):
        assert free_host_bytes() <= 2**28
