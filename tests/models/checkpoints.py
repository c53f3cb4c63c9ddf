"""Small random models of transformers, saved as users find them: config.json and safetensors in a folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from fa_research.config import Dtype, ModelConfig
from fa_research.config.checkpoint import take_from_folder
from fa_research.models import Decoder, build_model
from tests.engine.lab import VOCABULARY

REASON = "the extra hf is not installed"
transformers = pytest.importorskip("transformers", reason=REASON)
tokenizers = pytest.importorskip("tokenizers", reason=REASON)
safetensors = pytest.importorskip("safetensors.torch", reason=REASON)

WINDOW = 13
LLAMA_3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip


@dataclass(frozen=True)
class Peer:
    """A model of transformers: its classes begin with `family`; `options` differ from the common ones."""

    family: str
    options: dict[str, Any] = field(default_factory=dict)

    def make(self, **changes: Any) -> torch.nn.Module:
        """With random weights, norms and biases too, so that a swapped one shows."""
        config = getattr(transformers, f"{self.family}Config")(**COMMON | self.options | changes)
        model = getattr(transformers, f"{self.family}ForCausalLM")(config).eval()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                weight.normal_(1.0 if "norm" in name else 0.0, 0.15, generator=generator)
        return model


COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 160, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
QWEN_WINDOW = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 0}
PEERS = {
    "llama": Peer("Llama", {"rope_parameters": LLAMA_3}),
    "llama-tied": Peer("Llama", {"tie_word_embeddings": True}),
    "mistral": Peer("Mistral", {"sliding_window": WINDOW}),
    "qwen2": Peer("Qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen2-window": Peer("Qwen2", QWEN_WINDOW),
    "qwen3": Peer("Qwen3", {"head_dim": 64, "hidden_size": 96, "rms_norm_eps": 1e-3}),
    "qwen3-tied": Peer("Qwen3", {"head_dim": 64, "tie_word_embeddings": True}),
}


def save(
    peer: Peer, folder: Path, dtype: torch.dtype = torch.float32, vocab_size: int = VOCABULARY, **options: Any
) -> torch.nn.Module:
    """The model, saved in `folder` as `dtype`; `options` go to `save_pretrained`."""
    model = peer.make(vocab_size=vocab_size).to(dtype)
    model.save_pretrained(folder, **options)
    return model


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    """What we make of a folder, on the CPU."""
    config = take_from_folder(ModelConfig(path=str(folder), dtype=Dtype.float32))
    return build_model(config, dtype=dtype, device="cpu", seed=0)


def edit_config(folder: Path, **changes: Any) -> None:
    """Set keys of config.json; `...` removes one."""
    file = folder / "config.json"
    raw = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in raw.items() if value is not ...}))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a folder with one file."""
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in safetensors.load_file(file).items()}
    change(tensors)
    safetensors.save_file(tensors, file)


def save_tokenizer(folder: Path) -> Any:
    """A tokenizer.json of bytes and some pairs of them, at most 300 tokens, that begins every text with a token of
    its own unless told not to."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<s>"], show_progress=False
    )
    tokenizer.train_from_iterator(["is followed by " * 9 + "0123456789"], trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer
