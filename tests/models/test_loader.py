"""Loading: every weight exactly, from one file or shards; what is wrong with a folder is said by name, at once."""

from __future__ import annotations

import builtins
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fa_research.config import ModelConfig
from fa_research.config.checkpoint import take_from_folder
from fa_research.errors import CheckpointError
from fa_research.measure.cell import check
from fa_research.models import Decoder, build_model, load_weights
from fa_research.models.checkpoint_files import INDEX, ONE_FILE
from tests.engine.lab import EAGER, Lab, prompts_of
from tests.models.checkpoints import PEERS, edit_config, edit_weights, load, save
from tests.models.test_names import check_weights
from tests.workloads.cells import cell, prepared

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Q0 = "model.layers.0.self_attn.q_proj.weight"


def test_shards(tmp_path: Path) -> None:
    save(PEERS["qwen3"], tmp_path, max_shard_size="200KB")
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    check_weights(tmp_path)
    for name in shards[1:]:
        (tmp_path / name).unlink()
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path)
    assert all(name in str(caught.value) for name in [*shards[1:], INDEX, str(tmp_path)])
    assert shards[0] not in str(caught.value)


def check_logits(folder: Path, name: str, dtype: torch.dtype = torch.float32) -> Decoder:
    """The folder gives the logits of transformers, which loads it itself; in bfloat16, where every product is rounded,
    embedding and head are compared instead."""
    ours, theirs = load(folder, dtype), PEERS[name].open(folder, dtype, "cpu")
    assert torch.equal(ours.embedding, theirs.get_input_embeddings().weight)
    assert torch.equal(ours.head, theirs.get_output_embeddings().weight)
    assert (ours.head is ours.embedding) == ours.config.tie_word_embeddings
    assert len(ours.notes) == (ours.head is not ours.embedding and "tied" in name)
    if dtype == torch.float32:
        prompt = prompts_of(21)[0]
        with torch.no_grad():
            expected = theirs(torch.tensor([prompt])).logits[0]
        torch.testing.assert_close(Lab(EAGER, loaded=ours).again(prompt), expected, rtol=1e-4, atol=2e-4)
    return ours


Change = Callable[[dict[str, Tensor]], object]
HEAD_ALONE: Change = lambda t: t.update({HEAD: t.pop(EMBEDDING)})  # noqa: E731
SAME: Change = lambda t: t.update({HEAD: t[EMBEDDING].clone()})  # noqa: E731
OTHER: Change = lambda t: t.update({HEAD: 2 * t[EMBEDDING].flip(0)})  # noqa: E731
# The same in bfloat16 and not in float32.
ROUNDED: Change = lambda t: t.update({HEAD: t[EMBEDDING].bfloat16()})  # noqa: E731
WIDER: Change = lambda t: t.update({HEAD: t[EMBEDDING].double()})  # noqa: E731


@pytest.mark.parametrize(
    ("change", "dtype", "tied"),
    [
        (HEAD_ALONE, torch.float32, True),
        (HEAD_ALONE, torch.bfloat16, True),
        (SAME, torch.float32, True),
        (OTHER, torch.float32, False),
        (OTHER, torch.bfloat16, False),
        (ROUNDED, torch.float32, False),
        (ROUNDED, torch.bfloat16, True),
        (WIDER, torch.float32, True),
    ],
    ids=lambda value: str(value) if not callable(value) else "",
)
@pytest.mark.parametrize("name", ["llama-tied", "qwen3-tied"])
def test_a_tied_head_that_is_stored_is_read_as_in_transformers(
    name: str, change: Change, dtype: torch.dtype, tied: bool, tmp_path: Path
) -> None:
    save(PEERS[name], tmp_path)
    edit_weights(tmp_path, change)
    model = check_logits(tmp_path, name, dtype)
    assert (model.head is model.embedding) == tied


def test_a_tied_head_of_another_shape_is_refused(tmp_path: Path) -> None:
    save(PEERS["llama-tied"], tmp_path)
    edit_weights(tmp_path, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING][:-1].clone()}))
    with pytest.raises(CheckpointError, match=f"wrong shape: {HEAD} is "):
        load(tmp_path)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen2", "gptoss"])
def test_names_without_model_and_old_buffers_are_read_as_in_transformers(name: str, tmp_path: Path) -> None:
    save(PEERS[name], tmp_path)

    def age(tensors: dict[str, Tensor]) -> None:
        for full in [full for full in tensors if full.startswith("model.")]:
            tensors[full.removeprefix("model.")] = tensors.pop(full)
        for i in range(2):
            attention = f"layers.{i}.self_attn."
            tensors[f"{attention}bias"] = torch.ones(1, 1, 8, 8, dtype=torch.bool).tril()
            tensors[f"{attention}masked_bias"] = torch.tensor(-1e9)
            tensors[f"{attention}rotary_emb.inv_freq"] = torch.ones(32)

    edit_weights(tmp_path, age)
    check_logits(tmp_path, name)
    edit_weights(
        tmp_path,
        lambda t: t.update({Q0.removeprefix("model."): torch.zeros(2), "layers.9.x": torch.zeros(1)}),
    )
    with pytest.raises(
        CheckpointError, match=r"not part of the model: layers.9.x; wrong shape: layers.0.self"
    ):
        load(tmp_path)


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    save(PEERS["llama-tied"], tmp_path)
    up = "model.layers.1.mlp.up_proj.weight"

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[Q0][3, :2] = float("nan")
        tensors[Q0][5, 0] = float("inf")
        tensors[up][0, 0], tensors[up][1, 0] = float("inf"), float("-inf")

    edit_weights(tmp_path, spoil)
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path)
    message = str(caught.value)
    assert f"{Q0} (2 NaN and 1 infinite of 65,536)" in message and f"{up} (2 infinite of 24,576)" in message
    assert message.count("infinite") == 2 and message.endswith("fetch it again")


def test_weights_too_large_for_float16_are_named(tmp_path: Path) -> None:
    """Finite weights whose sum overflows are none."""
    save(PEERS["llama-tied"], tmp_path)
    edit_weights(tmp_path, lambda tensors: tensors[Q0].fill_(6e4))
    load(tmp_path, torch.float16)
    edit_weights(tmp_path, lambda tensors: tensors[Q0][0].fill_(7e4))
    load(tmp_path)
    with pytest.raises(
        CheckpointError, match=rf"{Q0} \(256 infinite of 65,536\); .* try model.dtype=bfloat16"
    ):
        load(tmp_path, torch.float16)


def test_the_row_says_that_a_head_is_not_tied(tmp_path: Path) -> None:
    """And the oracle uses the same head."""
    save(PEERS["llama-tied"], tmp_path)
    edit_weights(tmp_path, OTHER)
    config = cell("decode", model=take_from_folder(ModelConfig(path=str(tmp_path))))
    unit, engine = prepared(config)
    assert any("the files hold another lm_head" in note for note in engine.notes)
    passed, columns = check(engine, unit)
    assert passed, columns


def test_all_that_is_wrong_with_the_tensors_is_one_error(tmp_path: Path) -> None:
    save(PEERS["qwen2"], tmp_path)

    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[Q0], tensors[HEAD]
        tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(95, 256)
        tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int32)
        tensors["model.layers.7.mlp.up_proj.weight"] = torch.zeros(2)
        tensors["model.layers.0.self_attn.o_proj.bias"] = torch.zeros(256)

    edit_weights(tmp_path, change)
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path)
    message = str(caught.value)
    assert f"missing: {HEAD}, {Q0};" in message
    surplus = message.split("not part of the model: ")[1].split(";")[0]
    assert sorted(surplus.split(", ")) == [
        "model.layers.0.self_attn.o_proj.bias",
        "model.layers.7.mlp.up_proj.weight",
    ]
    assert "wrong shape: model.layers.1.mlp.up_proj.weight is [95, 256] and should be [96, 256];" in message
    assert message.endswith("wrong dtype, not one of BF16, F16, F32, F64: model.norm.weight is I32")


def test_a_config_of_another_size_does_not_fit(tmp_path: Path) -> None:
    save(PEERS["qwen3"], tmp_path)
    edit_config(tmp_path, num_hidden_layers=40, layer_types=...)
    with pytest.raises(
        CheckpointError, match="missing: model.layers.2.self_attn.q_proj.weight, .* and 368 more"
    ):
        load(tmp_path)


def test_nothing_is_written_before_all_is_checked(tmp_path: Path) -> None:
    save(PEERS["llama"], tmp_path)
    model = load(tmp_path)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    edit_weights(tmp_path, lambda tensors: [tensors.pop(HEAD), tensors[EMBEDDING].zero_()])
    with pytest.raises(CheckpointError):
        load_weights(model, tmp_path)
    assert all(torch.equal(before[name], weight) for name, weight in model.named_parameters())


@pytest.mark.parametrize("keep", [0, 5, 1000, -3], ids=lambda keep: f"keep{keep}")
def test_a_truncated_file_is_named(keep: int, tmp_path: Path) -> None:
    save(PEERS["llama"], tmp_path, max_shard_size="1MB")
    file = sorted(tmp_path.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=f"{file}.*truncated"):
        load(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": [1]}'])
def test_a_broken_index_is_named(content: str, tmp_path: Path) -> None:
    save(PEERS["llama"], tmp_path, max_shard_size="1MB")
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(CheckpointError, match=f"{INDEX} is no index"):
        load(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    save(PEERS["llama"], tmp_path)
    (tmp_path / ONE_FILE).rename(tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes())
    (tmp_path / INDEX).write_text(
        json.dumps({"weight_map": {EMBEDDING: "a.safetensors", Q0: "b.safetensors"}})
    )
    with pytest.raises(CheckpointError, match=f"b.safetensors holds tensors that another file.*{Q0}"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ((), "has neither model.safetensors nor model.safetensors.index.json$"),
        (("pytorch_model.bin",), r"it has pytorch_model.bin; convert them to safetensors first"),
        (("other.safetensors",), r"it has other.safetensors$"),
    ],
)
def test_a_folder_without_weights_says_what_it_has(files: tuple[str, ...], says: str, tmp_path: Path) -> None:
    save(PEERS["llama"], tmp_path)
    (tmp_path / ONE_FILE).unlink()
    for name in files:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=says):
        load(tmp_path)


def test_without_safetensors_the_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(PEERS["llama"], tmp_path)
    real = builtins.__import__

    def without(name: str, *args: Any) -> Any:
        if name == "safetensors":
            raise ImportError("No module named 'safetensors'")
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(CheckpointError, match=r"needs the package safetensors.*: pip install safetensors"):
        load(tmp_path)


def test_progress_counts_every_tensor(tmp_path: Path) -> None:
    save(PEERS["llama"], tmp_path)
    seen: list[tuple[str, int]] = []
    ticks: list[None] = []

    @contextmanager
    def progress(what: str, total: int) -> Iterator[Callable[[], object]]:
        seen.append((what, total))
        yield lambda: ticks.append(None)

    config = load(tmp_path).config
    build_model(config, dtype=torch.float32, device="cpu", seed=0, progress=progress)
    assert seen == [(f"loading {tmp_path.name}", 3 + 2 * 9)] and len(ticks) == 21
