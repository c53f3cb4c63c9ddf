"""Every tensor of every architecture's checkpoint is in the model, whatever it is stored as."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fa_research.config import ModelConfig
from fa_research.config.checkpoint import take_from_folder
from fa_research.config.hf_families import FAMILIES
from fa_research.models import Decoder, load_weights
from fa_research.models.names import HEAD, NAMES, weight_targets
from tests.models.checkpoints import PEERS, edit_config, edit_weights, load, safetensors, save


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


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_converted(stored: torch.dtype, tmp_path: Path) -> None:
    for name in ("qwen2", "gemma2", "gptoss"):
        save(PEERS[name], tmp_path, stored)
        check_weights(tmp_path)  # from 16 bit exactly, as float32 holds them all
        check_weights(tmp_path, torch.bfloat16)


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
