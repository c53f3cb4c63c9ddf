"""Models of every kind through workloads and the float64 oracle: local layers, experts, caps, sinks, norms."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fa_research import runner, workloads
from fa_research.config import (
    Activation,
    DecodeWorkload,
    Dtype,
    ExtendWorkload,
    GraphMode,
    LocalConfig,
    MaskConfig,
    ModelConfig,
    MoEConfig,
    RopeScaling,
    RopeType,
    TextWorkload,
    to_plain,
)
from fa_research.engine.model_runner import EngineModel
from fa_research.measure.cell import check
from fa_research.tracking import Status
from tests.helpers import DEVICES
from tests.workloads.cells import cell, model_config, prepared

WINDOW = MaskConfig("sliding_window", 13)
MODELS = {
    "gemma": model_config(
        num_layers=3, local=LocalConfig([True, True, False], WINDOW, rope_theta=100.0), post_norms=True, qk_norm=True,
        activation=Activation.gelu_tanh, embedding_scale=32**0.5, logit_softcap=0.1, softcap=0.5, attention_scale=0.1,
        tie_word_embeddings=True,
    ),
    "gptoss": model_config(
        local=LocalConfig([True, False], WINDOW), sink=True, qkv_bias=True, o_bias=True,
        activation=Activation.swiglu_clamped, moe=MoEConfig(8, 3, bias=True),
        rope_scaling=RopeScaling(RopeType.yarn, original_max_position=16), dtype=Dtype.float32,
    ),
    "qwen3moe": model_config(moe=MoEConfig(8, 3, norm_topk_prob=False), qk_norm=True, dtype=Dtype.float32),
}  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("workload", ["decode", "extend", "mixed", "text"])
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_passes_the_oracle(model: ModelConfig, workload: str, device: str) -> None:
    """On the GPU with decode steps in graphs; mixtures in float32, as two experts whose scores differ by less than
    bfloat16 can tell are both right."""
    config = cell(workload, device=device, backend="triton" if device == "cuda" else "torch", model=model)
    prepared_workload, engine = prepared(config)
    assert device == "cpu" or engine.graph_mode is GraphMode.on
    passed, columns = check(engine, prepared_workload)
    assert passed, columns


@pytest.mark.parametrize(("original", "factors", "turned"), [(16, "long", 0.25), (127, "short", 1.0)])
def test_a_run_chooses_its_rotation_and_says_so(
    original: int, factors: str, turned: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the longest sequence of the run, not by what the model could take."""
    scaling = RopeScaling(
        RopeType.longrope,
        original_max_position=original,
        short_factor=[1.0] * 32,
        long_factor=[4.0] * 32,
    )
    config = cell("decode", model=model_config(rope_scaling=scaling))
    assert config.model.max_context_len > 127
    tables: list[torch.Tensor] = []

    def spy(*args: Any, **options: Any) -> EngineModel:
        model = build(*args, **options)
        tables.append(model.cos_sin_XD)
        return model

    build = runner.build_model
    monkeypatch.setattr(runner, "build_model", spy)
    row = runner.run_cell(config, resolved=to_plain(config), output_dir=tmp_path, multirun=True)
    assert row.status is Status.ok
    (note,) = (note for note in row.notes if note.startswith("LongRoPE"))
    assert note.startswith(f"LongRoPE: {factors} factors for every sequence of this run;")
    reached = re.search(f"reaches ([0-9]+) of {original} tokens$", note)
    assert reached is not None and 16 < int(reached[1]) <= 127
    torch.testing.assert_close(tables[0][1, 0] / tables[0][0, 0], torch.tensor(turned).cos())


def test_written_text_may_be_the_longest_sequence() -> None:
    """The rotation is set up for every token that is read: of written text, all but the last."""
    options = TextWorkload(batch_size=2, prompt_len=20, shared_prefix_len=4, steps=4, prompt="x = 1")
    written, short, silent = (
        workloads.create(cell(dataclasses.replace(options, generate=n))).needs() for n in (90, 3, 0)
    )
    assert (written.rope_len, short.rope_len, silent.rope_len) == (5 + 90 - 1, 24, 24)


@pytest.mark.parametrize("kind", ["decode", "extend"])
@pytest.mark.parametrize(("num_experts", "expected"), [(0, 2), (4, 8)])
def test_of_a_mixture_more_requests_are_checked(kind: str, num_experts: int, expected: int) -> None:
    options = {
        "decode": DecodeWorkload(batch_size=9, context_len=5, steps=1),
        "extend": ExtendWorkload(batch_size=9, new_len=2),
    }
    model = model_config(moe=MoEConfig(num_experts, 2))
    workload, _ = prepared(cell(options[kind], model=model))
    _, cases = workload.checked_passes()
    assert len(cases) == expected
