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
ORIGINAL = 24  # tokens that the models with a scaled RoPE "were trained on"
ROPE_LEN = (
    96  # the longest sequence of the tests, for rotations that depend on it; tests on the GPU have their own
)


def rope(kind: str, **numbers: Any) -> dict[str, Any]:
    """`rope_parameters` of a type whose every band is within a short prompt."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **numbers}}


def windows(*kinds: str) -> dict[str, Any]:
    """`layer_types`, s or f each."""
    names = {"s": "sliding_attention", "f": "full_attention"}
    layer_types = [names[kind] for kind in kinds]
    return {"layer_types": layer_types, "num_hidden_layers": len(kinds), "sliding_window": WINDOW}


LLAMA_3 = rope(
    "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
)


def phi(original: int, head_dim: int) -> dict[str, Any]:
    """LongRoPE has a factor for each pair of a head's dims."""
    pairs = range(head_dim // 2)
    factors = {"short_factor": [1 + 0.05 * i for i in pairs], "long_factor": [1.5 + 0.25 * i for i in pairs]}
    return {
        **rope("longrope", **factors),
        "hidden_size": 4 * head_dim,
        "original_max_position_embeddings": original,
        "sliding_window": None,
    }


@dataclass(frozen=True)
class Peer:
    """A model of transformers: its class is `family`ForCausalLM; `options` of its config differ from the common ones.

    by_length: transformers computes its rotation anew for the length of each pass, and cached keys keep an older one.
    """

    family: str
    options: dict[str, Any] = field(default_factory=dict)
    by_length: bool = False

    @property
    def is_moe(self) -> bool:
        return self.family in ("Mixtral", "Qwen3Moe", "GptOss")

    def make(self, **changes: Any) -> torch.nn.Module:
        """With random weights, norms, biases and sinks too, so that a swapped or forgotten one shows."""
        model_class = getattr(transformers, f"{self.family}ForCausalLM")
        options = (
            COMMON | self.options | changes | {"attn_implementation": "eager"}
        )  # sdpa has no sinks, no softcap
        return self.fill(model_class.config_class(**options))

    def fill(self, config: Any) -> torch.nn.Module:
        """The same for a config of transformers."""
        model: torch.nn.Module = getattr(transformers, f"{self.family}ForCausalLM")(config).eval()
        self._settle(model)
        generator = torch.Generator().manual_seed(1)
        norm = 0.0 if self.family.startswith("Gemma") else 1.0  # Gemma's are offsets
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "sinks" in name:
                    weight.normal_(8.0, 3.0, generator=generator)  # as large as the scores' logsumexp
                else:
                    weight.normal_(norm if "norm" in name else 0.0, 0.15, generator=generator)
        return model

    def open(self, folder: Path, dtype: torch.dtype, device: str) -> torch.nn.Module:
        """A saved one, as transformers opens it: rotations stay in float32 whatever the dtype."""
        model_class = getattr(transformers, f"{self.family}ForCausalLM")
        model = model_class.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()
        self._settle(model)
        return model.to(device)

    def _settle(self, model: Any) -> None:
        if self.is_moe:
            model.set_experts_implementation("eager")


COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
QWEN_WINDOW = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 0}
GEMMA = {"hidden_size": 192, "query_pre_attn_scalar": 100}
YARN = rope("yarn", factor=16.0, original_max_position_embeddings=ORIGINAL, truncate=False)
YARN["max_position_embeddings"] = 16 * ORIGINAL
PEERS = {
    "llama": Peer("Llama", LLAMA_3),
    "llama-tied": Peer("Llama", {"tie_word_embeddings": True}),
    "llama-biases": Peer("Llama", {"attention_bias": True}),
    "llama-linear": Peer("Llama", rope("linear", factor=4.0)),
    "llama-dynamic": Peer(
        "Llama", rope("dynamic", factor=24.0) | {"max_position_embeddings": ORIGINAL}, by_length=True
    ),
    "llama-yarn": Peer("Llama", YARN),
    "mistral": Peer("Mistral", {"sliding_window": WINDOW}),
    "ministral": Peer("Ministral", windows("s", "f", "s") | {"head_dim": 96}),
    "qwen2": Peer("Qwen2", rope("default", rope_theta=1e6)),
    "qwen2-window": Peer("Qwen2", QWEN_WINDOW | {"num_hidden_layers": 3, "max_window_layers": 1}),
    "qwen3": Peer("Qwen3", {"head_dim": 64, "hidden_size": 96, "rms_norm_eps": 1e-3}),
    "qwen3-tied": Peer("Qwen3", {"head_dim": 64, "tie_word_embeddings": True}),
    "qwen3moe": Peer(
        "Qwen3Moe",
        {"head_dim": 64, "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 48},
    ),
    "mixtral": Peer("Mixtral", {"sliding_window": WINDOW, "num_local_experts": 6, "num_experts_per_tok": 2}),
    "gemma2": Peer(
        "Gemma2",
        GEMMA | windows("s", "f") | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 4.0}
        | {"head_dim": 128, "tie_word_embeddings": True},
    ),
    "gemma3": Peer(
        "Gemma3",
        GEMMA | windows("s", "s", "f")
        | {
            "head_dim": 64,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 10000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            }
        },
    ),
    "gptoss": Peer(
        "GptOss",
        {"head_dim": 64, "num_local_experts": 8, "num_experts_per_tok": 3} | windows("s", "f")
        | YARN,
    ),
    "phi3-long": Peer("Phi3", phi(ORIGINAL, head_dim=64), by_length=True),
    "phi3-short": Peer("Phi3", phi(400, head_dim=96), by_length=True),
}  # fmt: skip


def save(
    peer: Peer, folder: Path, dtype: torch.dtype = torch.float32, vocab_size: int = VOCABULARY, **options: Any
) -> torch.nn.Module:
    """The model, saved in `folder` as `dtype`; `options` go to `save_pretrained`."""
    model = peer.make(vocab_size=vocab_size).to(dtype)
    model.save_pretrained(folder, **options)
    return model


def load(
    folder: Path, dtype: torch.dtype = torch.float32, device: str = "cpu", rope_len: int = ROPE_LEN
) -> Decoder:
    """What we make of a folder."""
    config = take_from_folder(ModelConfig(path=str(folder), dtype=Dtype.float32))
    return build_model(config, dtype=dtype, device=device, seed=0, rope_len=rope_len)


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
