"""`sampling.*` reaches every token that a workload chooses: after a prefill, in decode steps, in generated text."""

from __future__ import annotations

from pathlib import Path

import pytest

from fa_research.config import (
    Config,
    CudaGraphConfig,
    DecodeWorkload,
    GraphMode,
    SamplingConfig,
    TextWorkload,
)
from fa_research.engine.sampling import SamplingParams
from fa_research.workloads.decode import Decode
from fa_research.workloads.text import Text
from tests.workloads.cells import cell, prepared, text_file

GREEDY, HOT = SamplingConfig(), SamplingConfig(temperature=50.0, seed=3)


def text_cell(tmp_path: Path, sampling: SamplingConfig, mode: GraphMode = GraphMode.simulate) -> Config:
    options = TextWorkload(
        path=str(text_file(tmp_path)), batch_size=2, prompt_len=23, shared_prefix_len=5, chunk_size=7, steps=6,
        generate=9, prompt="def main(",
    )  # fmt: skip
    return cell(options, cuda_graph=CudaGraphConfig(mode, [1, 2]), sampling=sampling)


def tokens_of(config: Config) -> tuple[list[list[int]], list[int]]:
    """The tokens after each prompt, and those of generated text."""
    workload, engine = prepared(config)
    assert isinstance(workload, Text)
    workload.checked_passes()
    return workload.generated, list(workload.generation(engine).tokens())


def test_text_is_drawn_with_the_requests_own_seeds(tmp_path: Path) -> None:
    greedy = tokens_of(text_cell(tmp_path, GREEDY))
    batch, alone = tokens_of(text_cell(tmp_path, HOT))
    assert (batch, alone) == tokens_of(text_cell(tmp_path, HOT, GraphMode.off))
    for ours, likeliest in zip(batch, greedy[0], strict=True):
        assert ours[0] != likeliest[0] and len(set(ours)) > 3  # the prefill's token too
    assert alone[0] != greedy[1][0] and len(set(alone)) > 5
    other = SamplingConfig(temperature=50.0, seed=4)
    assert tokens_of(text_cell(tmp_path, other))[1] != alone


@pytest.mark.parametrize("sampling", [GREEDY, HOT])
def test_decode_steps_are_sampled_if_the_config_says_so(sampling: SamplingConfig) -> None:
    config = cell(DecodeWorkload(batch_size=2, context_len=9, steps=3), sampling=sampling)
    workload, _ = prepared(config)
    assert isinstance(workload, Decode)
    assert workload.decoder.sampling == (sampling.temperature > 0)
    assert workload.decoder.state.temperature_B[:2].tolist() == [sampling.temperature] * 2
    if sampling.temperature:
        assert workload.sampling == [SamplingParams(50.0, seed=3), SamplingParams(50.0, seed=4)]
        assert workload.decoder.state.seed_B[:2].tolist() == [3, 4]
