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
from fa_research.config.hf_families import FAMILIES
from fa_research.errors import CheckpointError
from fa_research.models import Decoder, build_model, load_weights
from fa_research.models.checkpoint_files import INDEX, ONE_FILE
from fa_research.models.names import NAMES, weight_targets
from tests.models.checkpoints import PEERS, edit_config, edit_weights, load, safetensors, save

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Q0 = "model.layers.0.self_attn.q_proj.weight"


def read(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, as safetensors itself reads them."""
    files = folder.glob("*.safetensors")
    return {name: tensor for file in files for name, tensor in safetensors.load_file(file).items()}


def check_weights(folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Every tensor of the folder is in the model, bit for bit after conversion, and nothing of the model is left out.
    Whether it is in the right place is for test_parity.py."""
    config = take_from_folder(ModelConfig(path=str(folder)))
    model, stored = Decoder(config, dtype=dtype, device="cpu"), read(folder)
    for weight in model.parameters():
        weight.fill_(float("nan"))
    load_weights(model, folder)
    targets = weight_targets(model, stored).values()
    spare = {name for name in stored if "inv_freq" in name or (name == HEAD and config.tie_word_embeddings)}
    assert {name for target in targets for name in target.sources} == stored.keys() - spare
    for target in targets:
        tensors = [stored[name] for name in target.sources]
        expected = tensors[0] if target.transform is None else target.transform(*tensors)
        assert torch.equal(target.destination, expected.to(target.destination.dtype)), target.sources
    assert not any(weight.isnan().any() for weight in model.parameters())


@pytest.mark.parametrize("name", PEERS)
def test_every_weight_is_loaded(name: str, tmp_path: Path) -> None:
    save(PEERS[name], tmp_path)
    assert not list(tmp_path.glob("*.index.json"))
    check_weights(tmp_path)


def test_every_architecture_is_tested() -> None:
    assert {f"{peer.family}ForCausalLM" for peer in PEERS.values()} == set(FAMILIES) >= set(NAMES)


def test_gemma_norms_are_offsets_from_one(tmp_path: Path) -> None:
    """Added in float32: near 1 bfloat16 would lose all but seven bits of them."""
    theirs = save(PEERS["gemma3"], tmp_path, torch.bfloat16)
    model = load(tmp_path, torch.bfloat16)
    offset = theirs.model.layers[1].pre_feedforward_layernorm.weight
    assert model.layers[1].mlp_norm_E.dtype == torch.float32
    assert torch.equal(model.layers[1].mlp_norm_E, 1 + offset.float())
    assert not torch.equal(model.layers[1].mlp_norm_E, (1 + offset).float())


def test_experts_in_mxfp4_as_gpt_oss_is_published(tmp_path: Path) -> None:
    """Each row of a neuron is blocks of 32 values in 4 bits (sign, two bits of exponent, one of mantissa) with a power
    of two each; gate and up take turns."""
    save(PEERS["gptoss"], tmp_path)
    generator = torch.Generator().manual_seed(0)

    def pack(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
            num_experts, columns, rows = tensors.pop(name).shape
            shape = (num_experts, rows, columns // 32)
            blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=generator)
            scales = torch.randint(118, 128, shape, dtype=torch.uint8, generator=generator)
            tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}

    edit_weights(tmp_path, pack)
    edit_config(tmp_path, quantization_config={"quant_method": "mxfp4"})
    check_weights(tmp_path, torch.bfloat16)
    model, stored = load(tmp_path, torch.bfloat16), read(tmp_path)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    blocks, scales = stored[f"{name}_blocks"], stored[f"{name}_scales"]
    for expert, neuron, column in [(0, 0, 0), (7, 95, 255), (3, 40, 33), (5, 1, 64)]:
        for part in (0, 1):
            row, block, place = 2 * neuron + part, column // 32, column % 32
            byte = int(blocks[expert, row, block, place // 2])
            code = byte >> 4 if place % 2 else byte & 15
            exponent, mantissa = code >> 1 & 3, code & 1
            value = (1 + mantissa / 2) * 2.0 ** (exponent - 1) if exponent else mantissa / 2
            value *= (-1 if code & 8 else 1) * 2.0 ** (int(scales[expert, row, block]) - 127)
            assert model.layers[1].mlp.gate_up[expert, part * 96 + neuron, column] == value


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_converted(stored: torch.dtype, tmp_path: Path) -> None:
    for name in ("qwen2", "gemma2", "gptoss"):
        save(PEERS[name], tmp_path, stored)
        check_weights(tmp_path)  # from 16 bit exactly, as float32 holds them all
        check_weights(tmp_path, torch.bfloat16)


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


def test_a_tied_head_may_be_stored_too_if_it_is_the_same(tmp_path: Path) -> None:
    save(PEERS["llama-tied"], tmp_path)
    edit_weights(tmp_path, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}))
    check_weights(tmp_path)
    model = load(tmp_path)
    assert model.head is model.embedding
    edit_weights(tmp_path, lambda tensors: tensors[HEAD].mul_(2))
    with pytest.raises(
        CheckpointError, match=r"not part of the model: lm_head.weight \(differs from the tied"
    ):
        load(tmp_path)


def test_stored_frequencies_of_the_rotation_are_left_alone(tmp_path: Path) -> None:
    save(PEERS["llama"], tmp_path)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_weights(tmp_path, lambda tensors: tensors.update({name: torch.ones(32)}))
    check_weights(tmp_path)


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


def test_without_safetensors_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(PEERS["llama"], tmp_path)
    real = builtins.__import__

    def without(name: str, *args: Any) -> Any:
        if name == "safetensors":
            raise ImportError("No module named 'safetensors'")
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(CheckpointError, match=r"needs the package safetensors.*extra hf: pip install"):
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
