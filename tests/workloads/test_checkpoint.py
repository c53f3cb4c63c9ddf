"""Workloads over a checkpoint: its weights, its shape in the row, text through its tokenizer."""

from __future__ import annotations

import builtins
import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fa_research.config import Config, Level, ModelConfig, TextWorkload, to_plain
from fa_research.config.checkpoint import take_from_folder
from fa_research.errors import CheckpointError, ConfigError
from fa_research.models.tokenizer import load_tokenizer
from fa_research.runner import run_cell
from fa_research.tracking import Row, Status, read_rows
from fa_research.workloads.text import Text
from tests.models.checkpoints import PEERS, edit_config, save, save_tokenizer
from tests.workloads.cells import cell, prepared, text_file

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = TextWorkload(batch_size=3, prompt_len=41, shared_prefix_len=19, chunk_size=7, steps=5)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model with room for bytes, without a tokenizer."""
    save(PEERS["qwen2"], tmp_path / "model", vocab_size=300)
    return tmp_path / "model"


def cell_of(folder: Path, text: Path, level: Level = Level.model, **changes: Any) -> Config:
    model = take_from_folder(ModelConfig(path=str(folder)))
    options = dataclasses.replace(OPTIONS, path=str(text), **changes)
    return cell(options, level, model=model)


def run(config: Config, folder: Path) -> Row:
    return run_cell(config, resolved=to_plain(config), output_dir=folder, multirun=True)


def test_the_loaded_model_writes_what_transformers_writes(folder: Path, tmp_path: Path) -> None:
    workload, engine = prepared(cell_of(folder, text_file(tmp_path)))
    assert isinstance(workload, Text)
    workload.checked_passes()
    theirs = PEERS["qwen2"].make(vocab_size=300)
    for prompt, generated in zip(workload.prompts, workload.generated, strict=True):
        ids = torch.tensor([prompt])
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 5, "do_sample": False}
        assert theirs.generate(ids, **options)[0, -5:].tolist() == generated
    assert engine.notes == ["text as bytes: no tokenizer.json"]


def test_the_row_has_the_shape_and_the_tokens(folder: Path, tmp_path: Path) -> None:
    save_tokenizer(folder)
    row = run(cell_of(folder, text_file(tmp_path)), tmp_path)
    assert row.status is Status.ok and row.checks["logits_passed"] is True
    assert row.notes == ["text by tokenizer.json, every prompt begins with token [0]"]
    shape = {"name": "model", "path": str(folder), "hidden_size": 256, "vocab_size": 300, "qkv_bias": True}
    assert shape.items() <= row.config["model"].items()


def test_the_attention_path_alone_needs_no_weights(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert run(cell_of(folder, text_file(tmp_path), Level.attention), tmp_path).status is Status.ok


def test_prompts_are_the_tokenizers(folder: Path, tmp_path: Path) -> None:
    tokenizer, text = save_tokenizer(folder), text_file(tmp_path)
    workload, _ = prepared(cell_of(folder, text))
    assert isinstance(workload, Text)
    tokens = tokenizer.encode(text.read_text()).ids
    assert tokens[0] == 0 and 0 not in tokens[1:] and len(tokens) < 0.8 * len(text.read_bytes())
    assert [len(prompt) for prompt in workload.prompts] == [41] * 3
    assert all(prompt[:19] == tokens[:19] for prompt in workload.prompts)
    assert workload.prompts[0] == tokens[:41] and workload.passages[0].tokens == tokens[:47]
    text.write_text("is followed by " * 12)
    with pytest.raises(
        ConfigError, match=r"text.txt holds \d+ tokens, 3 prompts.* need 102; give a longer text"
    ):
        prepared(cell_of(folder, text))


def test_a_vocabulary_too_small(folder: Path, tmp_path: Path) -> None:
    edit_config(folder, vocab_size=250)
    with pytest.raises(ConfigError, match="uses byte tokens: model.vocab_size=250 must be at least 256"):
        Text(cell_of(folder, text_file(tmp_path))).needs()
    save_tokenizer(folder)
    tokenizer = load_tokenizer(take_from_folder(ModelConfig(path=str(folder))))
    with pytest.raises(
        CheckpointError, match=r"tokenizer.json gives token 2\d\d, the model's vocabulary has 250"
    ):
        tokenizer.encode("é is followed by 1".encode())


def test_a_broken_tokenizer_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig(path=str(folder))
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer.json is no tokenizer"):
        load_tokenizer(config)
    real = builtins.__import__

    def without(name: str, *args: Any) -> Any:
        if name == "tokenizers":
            raise ImportError("No module named 'tokenizers'")
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(CheckpointError, match="needs the package tokenizers.*extra hf"):
        load_tokenizer(config)


def test_from_the_command_line(folder: Path, tmp_path: Path) -> None:
    """The folder's shape is in the row; a key that contradicts it is an error, also where it is the default's value."""
    edit_config(folder, max_position_embeddings=159)
    arguments = [
        "-m", f"model.path={folder}", "model.max_context_len=159,4096", "workload.batch_size=1",
        "workload.generate=0", "workload.prompt_len=40", "workload.shared_prefix_len=0", "workload.steps=2",
        "measure=quick", "tracking=disabled", f"hydra.sweep.dir={tmp_path / 'out'}",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "run.py", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    right, wrong = read_rows(tmp_path / "out" / "rows.jsonl")
    assert right.status is Status.ok, done.stderr
    assert (right.config["model"]["num_layers"], right.config["model"]["max_context_len"]) == (2, 159)
    assert right.config["model"]["hidden_size"] == 256
    assert wrong.status is Status.error
    assert "decides model.max_context_len=159 (given: 4096); leave it out" in wrong.reasons[0]
