"""The Hugging Face folder of a trained model: config.json and model.safetensors in bfloat16."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from model import ModelSettings, TinyModel
from safetensors.torch import load_file, save_file


def hf_config(s: ModelSettings) -> dict[str, Any]:
    """As `transformers.Qwen3Config.save_pretrained` writes it."""
    kinds = ["sliding_attention" if s.is_sliding(i) else "full_attention" for i in range(s.num_layers)]
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "dtype": "bfloat16",
        "eos_token_id": 0,
        "head_dim": s.head_dim,
        "hidden_act": "silu",
        "hidden_size": s.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": s.intermediate_size,
        "layer_types": kinds,
        "max_position_embeddings": s.max_context_len,
        "max_window_layers": s.num_layers,
        "model_type": "qwen3",
        "num_attention_heads": s.num_heads,
        "num_hidden_layers": s.num_layers,
        "num_key_value_heads": s.num_kv_heads,
        "pad_token_id": None,
        "rms_norm_eps": s.rms_norm_eps,
        "rope_parameters": {"rope_theta": s.rope_theta, "rope_type": "default"},
        "sliding_window": s.sliding_window,
        "tie_word_embeddings": True,
        "use_cache": True,
        "use_sliding_window": True,
        "vocab_size": s.vocab_size,
    }


def settings_of(config: dict[str, Any]) -> ModelSettings:
    """The settings that `hf_config` was made from."""
    return ModelSettings(
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        max_context_len=config["max_position_embeddings"],
        sliding_window=config["sliding_window"],
        full_every=config["layer_types"].index("full_attention") + 1,
        rope_theta=config["rope_parameters"]["rope_theta"],
        rms_norm_eps=config["rms_norm_eps"],
        vocab_size=config["vocab_size"],
    )


@torch.no_grad()
def round_to_bf16(model: TinyModel) -> None:
    """In place, still float32: what is measured is what is shipped."""
    for weight in model.parameters():
        weight.copy_(weight.bfloat16())


def save(model: TinyModel, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf_config(model.s), indent=2) + "\n")
    tensors = {f"model.{k}": v.detach().bfloat16().cpu().contiguous() for k, v in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)


def load(folder: Path) -> TinyModel:
    """A model as `save` left it, in float32 on the CPU."""
    model = TinyModel(settings_of(json.loads((folder / "config.json").read_text())))
    tensors = load_file(folder / "model.safetensors")
    model.load_state_dict({key.removeprefix("model."): value.float() for key, value in tensors.items()})
    return model.eval()
