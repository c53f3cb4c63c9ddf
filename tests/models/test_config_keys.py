"""Every key of config.json has a place for every architecture: what it says is taken over as transformers does, it is
refused, or it is left alone because transformers leaves it alone too. A key that is in no table fails here, whether our
readers ask for it or the configuration class of transformers has it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from fa_research.config import ModelConfig
from fa_research.config.hf_config import model_fields
from fa_research.config.hf_families import FAMILIES
from fa_research.config.hf_rope import _EVERY_TYPE, _KEYS
from fa_research.errors import ConfigError
from fa_research.models.rope import build_cos_sin
from tests.engine.lab import EAGER, Lab
from tests.models.checkpoints import Peer, load
from tests.models.test_families import config_class

ALL = frozenset(name.removesuffix("ForCausalLM") for name in FAMILIES)
MOE = frozenset({"Qwen3Moe", "Mixtral", "GptOss"})
GEMMA = frozenset({"Gemma2", "Gemma3"})
NESTED = frozenset({"Gemma3"})  # a table of rotations for each kind of layer
PHI = frozenset({"Phi3"})
SWITCHED = frozenset({"Qwen2", "Qwen3", "Qwen3Moe"})  # windows only with use_sliding_window
LISTED = frozenset({"Ministral", "Qwen2", "Qwen3", "GptOss"}) | GEMMA  # layer_types is read
BIASED = frozenset({"Llama", "Qwen3", "Qwen3Moe", "GptOss"}) | GEMMA  # attention_bias is read
FIXED_ACTIVATION = frozenset({"GptOss"})

SIZES: dict[str, Any] = {
    "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "intermediate_size": 24, "vocab_size": 40, "max_position_embeddings": 64, "pad_token_id": 0, "rms_norm_eps": 1e-5,
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "Qwen3Moe": {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2},
    "Mixtral": {"num_local_experts": 4},
    "GptOss": {"num_local_experts": 6},
    "Gemma3": {"sliding_window_pattern": 2},
}
LENGTH = 20  # tokens of the prompt: past every window and original length below


@dataclass(frozen=True)
class Key:
    """What architectures make of a key: `honoured` and `refused` name those that do; the others leave it alone.

    value: another than the default. beside: keys without which it would have no effect; `...` removes one.
    topic: of keys of one topic only one is set at a time, where one would hide the other.
    """

    value: Any
    honoured: frozenset[str] = frozenset()
    refused: frozenset[str] = frozenset()
    beside: Mapping[str, Any] = field(default_factory=dict)
    topic: str = ""

    def place(self, architecture: str) -> str:
        if architecture in self.honoured:
            return "honoured"
        return "refused" if architecture in self.refused else "left alone"


LONGROPE = {
    "rope_type": "longrope", "short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [2.0, 3.0, 4.0, 6.0],
}  # fmt: skip
WINDOW = {"sliding_window": 6, "use_sliding_window": True}
# A key, or a key and after a dot what sets this entry apart from another of the same key.
KEYS: dict[str, Key] = {
    "num_hidden_layers": Key(3, ALL, topic="windows"),
    "hidden_size": Key(48, ALL),
    "num_attention_heads": Key(8, ALL),
    "num_key_value_heads": Key(4, ALL),
    "head_dim": Key(16, ALL, topic="rope"),
    "vocab_size": Key(50, ALL),
    "max_position_embeddings": Key(200000, ALL),  # more than the default scaling of gpt-oss gives
    "intermediate_size": Key(40, ALL - {"Qwen3Moe"}),
    "moe_intermediate_size": Key(24, frozenset({"Qwen3Moe"})),
    "rms_norm_eps": Key(0.1, ALL),
    "tie_word_embeddings": Key(True, ALL - GEMMA),
    "tie_word_embeddings.untied": Key(False, GEMMA),
    "attention_bias": Key(True, BIASED - {"GptOss"}, refused=ALL - BIASED),
    "attention_bias.none": Key(False, frozenset({"GptOss"})),
    "mlp_bias": Key(True, refused=ALL),
    "hidden_act": Key("gelu_pytorch_tanh", ALL - GEMMA - FIXED_ACTIVATION),
    "hidden_act.other": Key("relu", refused=ALL - GEMMA - FIXED_ACTIVATION),
    "hidden_activation": Key("silu", GEMMA),
    "hidden_activation.other": Key("relu", refused=GEMMA),
    "swiglu_alpha": Key(1.5, refused=frozenset({"GptOss"})),
    "swiglu_limit": Key(5.0, refused=frozenset({"GptOss"})),
    "query_pre_attn_scalar": Key(20, GEMMA),
    "attn_logit_softcapping": Key(0.5, frozenset({"Gemma2"}), refused=ALL - GEMMA),
    "attn_logit_softcapping.none": Key(None, frozenset({"Gemma2"})),
    "final_logit_softcapping": Key(0.5, GEMMA, refused=ALL - GEMMA),
    "final_logit_softcapping.none": Key(None, frozenset({"Gemma2"})),
    "sliding_window": Key(5, ALL - {"Llama"}, beside={"use_sliding_window": True, "max_window_layers": 1}),
    "sliding_window.none": Key(
        None, frozenset({"Mistral", "Ministral"}), refused=GEMMA | {"GptOss"}, topic="windows"
    ),
    "use_sliding_window": Key(
        True, SWITCHED, beside={"sliding_window": 6, "max_window_layers": 1}, topic="windows"
    ),
    "max_window_layers": Key(1, frozenset({"Qwen2", "Qwen3"}), beside=WINDOW, topic="windows"),
    "layer_types": Key(
        ["full_attention", "sliding_attention"], LISTED, refused=ALL - LISTED, beside=WINDOW, topic="windows"
    ),
    "sliding_window_pattern": Key(3, NESTED, beside=WINDOW | {"num_hidden_layers": 3}, topic="windows"),
    "num_experts": Key(5, MOE, refused=ALL - MOE, beside={"num_local_experts": ...}),
    "num_local_experts": Key(5, MOE, refused=ALL - MOE, beside={"num_experts": ...}),
    "num_experts_per_tok": Key(3, MOE),
    "norm_topk_prob": Key(True, frozenset({"Qwen3Moe"})),
    "decoder_sparse_step": Key(2, refused=MOE),
    "mlp_only_layers": Key([1], refused=ALL),
    "n_routed_experts": Key(4, refused=ALL),
    "rope_theta": Key(50.0, ALL),
    "rope_scaling": Key({"rope_type": "linear", "factor": 4.0}, ALL - PHI, refused=PHI, topic="rope"),
    "rope_parameters": Key(
        {"rope_type": "default", "rope_theta": 20.0}, ALL - NESTED, refused=NESTED, topic="rope"
    ),
    "rope_parameters.empty": Key({}, frozenset({"GptOss"}), topic="rope"),
    "rope_parameters.full_attention": Key(
        {"full_attention": {"rope_type": "linear", "factor": 4.0}}, NESTED, refused=ALL - NESTED, topic="rope"
    ),
    "rope_parameters.sliding_attention": Key(
        {"sliding_attention": {"rope_type": "default", "rope_theta": 20.0}}, NESTED, refused=ALL - NESTED,
        topic="rope",
    ),
    "rope_local_base_freq": Key(50.0, NESTED),
    "partial_rotary_factor": Key(0.5, refused=ALL),
    "original_max_position_embeddings": Key(
        12, ALL - NESTED, beside={"rope_scaling": LONGROPE, "hidden_size": 32, "num_attention_heads": 4},
        topic="rope",
    ),
    "architectures": Key(["FalconForCausalLM"], refused=ALL),
    "is_causal": Key(False, refused=ALL),
    "quantization_config": Key({"quant_method": "fp8"}, refused=ALL),
    "compression_config": Key({"format": "int4"}, refused=ALL),
    "attention_chunk_size": Key(8, refused=ALL),
    "no_rope_layers": Key([1, 0], refused=ALL),
    "is_encoder_decoder": Key(True, refused=ALL),
    "add_cross_attention": Key(True, refused=ALL),
    "text_config": Key({"hidden_size": 32}, refused=ALL),
    "use_bidirectional_attention": Key(True, refused=ALL),
    "per_layer_config": Key({"0": {"head_dim": 16}}, refused=ALL),
}  # fmt: skip
# Of the configuration classes: tokens, training, what is returned, how weights begin and are stored.
NO_RESULT = {
    "attention_dropout", "bos_token_id", "chunk_size_feed_forward", "dtype", "embd_pdrop", "eos_token_id", "id2label",
    "initializer_range", "label2id", "output_hidden_states", "output_router_logits", "pad_token_id", "pretraining_tp",
    "problem_type", "resid_pdrop", "return_dict", "router_aux_loss_coef", "router_jitter_noise",
    "transformers_version", "use_cache",
}  # fmt: skip

# Of a table of a rotation: the key, a value that is no default, and the types that take it.
ROPE_KEYS: dict[str, tuple[Any, set[str]]] = {
    "rope_type": (None, set(_KEYS)),  # in every table
    "type": (None, set(_KEYS)),  # its older name
    "rope_theta": (30.0, set(_KEYS)),
    "partial_rotary_factor": (1.0, set(_KEYS)),  # any other is refused
    "factor": (5.0, {"linear", "dynamic", "llama3", "yarn", "longrope"}),
    "low_freq_factor": (0.5, {"llama3"}),
    "high_freq_factor": (5.0, {"llama3"}),
    "original_max_position_embeddings": (500, {"llama3", "yarn", "longrope"}),
    "attention_factor": (1.5, {"yarn", "longrope"}),
    "beta_fast": (2.0, {"yarn"}),
    "beta_slow": (0.5, {"yarn"}),
    "mscale": (0.7, {"yarn"}),
    "mscale_all_dim": (0.4, {"yarn"}),
    "truncate": (False, {"yarn"}),
    "finetuned": (True, {"yarn"}),
    "short_factor": ([1.0, 1.25, 2.0, 2.5], {"longrope"}),
    "long_factor": ([2.0, 2.5, 3.0, 3.5], {"longrope"}),
}
ROPE_TABLES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "llama3": {
        "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 10,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 4000, "mscale": 0.5, "mscale_all_dim": 0.6},
    "longrope": {**LONGROPE, "original_max_position_embeddings": 10},
}  # fmt: skip


def base(architecture: str) -> dict[str, Any]:
    model_type = getattr(transformers, config_class(architecture)).model_type
    own = OWN.get(architecture, {})
    return {"architectures": [f"{architecture}ForCausalLM"], "model_type": model_type, **SIZES, **own}


def changed(raw: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in (raw | changes).items() if value is not ...}


def json_key(name: str) -> str:
    return name.partition(".")[0]


def without_and_with(architecture: str, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json without a key of the table, but what goes beside it, and with it."""
    key = KEYS[name]
    without = changed(base(architecture), key.beside)
    return without, changed(without, {json_key(name): key.value})


def read(raw: Mapping[str, Any]) -> ModelConfig:
    return ModelConfig(**model_fields(raw, "here"))


@pytest.mark.parametrize("name", KEYS)
def test_each_key_is_honoured_refused_or_left_alone(name: str) -> None:
    for architecture in sorted(ALL):
        without, with_it = without_and_with(architecture, name)
        match KEYS[name].place(architecture):
            case "honoured":
                assert read(with_it) != read(without), architecture
            case "left alone":
                assert read(with_it) == read(without), architecture
            case "refused":
                with pytest.raises(
                    ConfigError, match=name.split(".")[-1] if "attention" in name else json_key(name)
                ):
                    read(with_it)
                if name != "architectures":
                    read(without)


def batches(architecture: str) -> Iterator[dict[str, Any]]:
    """Changes to `base` that together set every key that is not refused, as many at a time as hide no other."""
    left = [name for name in KEYS if KEYS[name].place(architecture) != "refused"]
    if (
        architecture == "Ministral"
    ):  # its configuration class takes null, its model in transformers fails then
        left.remove("sliding_window.none")
    while left:
        changes: dict[str, Any] = {}
        topics: set[str] = set()
        for name in list(left):
            key = KEYS[name]
            more = {**key.beside, json_key(name): key.value}
            fits = all(changes.get(k, v) == v for k, v in more.items()) and key.topic not in topics - {""}
            if fits:
                changes |= more
                topics.add(key.topic)
                left.remove(name)
        yield changes


BATCHES = [
    pytest.param(architecture, changes, id=f"{architecture}-{i}")
    for architecture in sorted(ALL)
    for i, changes in enumerate(batches(architecture))
]


@pytest.mark.parametrize(("architecture", "changes"), BATCHES)
def test_logits_are_those_of_transformers(architecture: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """Of a folder with keys that are honoured and keys that are left alone."""
    raw = changed(base(architecture), changes)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config = transformers.AutoConfig.from_pretrained(tmp_path, attn_implementation="eager")
    theirs: Any = Peer(architecture).fill(config)
    theirs.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(raw))  # as it was, not as transformers writes it
    prompt = torch.randint(40, (LENGTH,), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.no_grad():
        expected = theirs(torch.tensor([prompt])).logits[0]
    actual = Lab(EAGER, loaded=load(tmp_path, rope_len=LENGTH)).again(prompt)
    assert expected.std() > 0.1
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-4)


class Recorder(dict[str, Any]):
    """A config.json that keeps which of its keys were asked for, its tables' after a dot."""

    def __init__(self, raw: Mapping[str, Any], seen: set[str], prefix: str = "") -> None:
        nested = {k: Recorder(v, seen, f"{prefix}{k}.") if isinstance(v, dict) else v for k, v in raw.items()}
        super().__init__(nested)
        self.seen, self.prefix = seen, prefix

    def get(self, key: str, default: Any = None) -> Any:
        self.seen.add(self.prefix + key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.seen.add(self.prefix + key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.seen.add(f"{self.prefix}{key}")
        return super().__contains__(key)


def test_every_key_that_is_asked_for_is_in_the_tables() -> None:
    seen: set[str] = set()
    for architecture in ALL:
        for name in KEYS:
            for raw in without_and_with(architecture, name):
                with suppress(ConfigError):
                    read(Recorder(raw, seen))
        for kind, numbers in ROPE_TABLES.items():
            raw = base(architecture) | {"rope_scaling": {"rope_type": kind, **numbers}}
            with suppress(ConfigError):
                read(Recorder(raw, seen))
    top = {key for key in seen if "." not in key}
    tables = {key.rpartition(".")[2] for key in seen if key.startswith(("rope_scaling.", "rope_parameters."))}
    assert top == {json_key(name) for name in KEYS}
    assert tables - {"full_attention", "sliding_attention"} == ROPE_KEYS.keys() - {"finetuned"}


@pytest.mark.parametrize("architecture", sorted(ALL))
def test_every_key_of_transformers_is_in_the_tables(architecture: str) -> None:
    theirs = {item.name for item in fields(getattr(transformers, config_class(architecture)))}
    assert theirs <= {json_key(name) for name in KEYS} | NO_RESULT


def test_of_a_table_of_a_rotation_each_type_has_its_keys() -> None:
    assert ROPE_TABLES.keys() == _KEYS.keys()
    for kind, numbers in ROPE_TABLES.items():
        assert {key for key, (_, kinds) in ROPE_KEYS.items() if kind in kinds} == _EVERY_TYPE | _KEYS[kind]
        for key, (value, kinds) in ROPE_KEYS.items():
            if kind not in kinds:
                with pytest.raises(
                    ConfigError, match=f"rope_scaling.{key}=.* is not supported with RoPE of type"
                ):
                    read(base("Llama") | {"rope_scaling": {"rope_type": kind, **numbers, key: value}})


@pytest.mark.parametrize("kind", _KEYS)
def test_of_a_table_of_a_rotation_each_key_is_honoured(kind: str, tmp_path: Path) -> None:
    """The cosines and sines of transformers for the same file, and others than without the key."""
    plain = rotation({"rope_type": kind, **ROPE_TABLES[kind]}, tmp_path)
    for key, (value, kinds) in ROPE_KEYS.items():
        if kind in kinds:
            name = key if value is None else "rope_type"
            ours = rotation(
                ROPE_TABLES[kind] | {name: kind} | ({} if value is None else {key: value}), tmp_path
            )
            # Short factors: the length is past the original one.
            same = value is None or key in ("partial_rotary_factor", "finetuned", "short_factor")
            assert torch.equal(ours, plain) == same, key


def rotation(table: dict[str, Any], folder: Path) -> torch.Tensor:
    """Cosines and sines of a Llama with this table, which are those of transformers."""
    raw = base("Llama") | {"rope_scaling": table, "max_position_embeddings": 18}
    (folder / "config.json").write_text(json.dumps(raw))
    rotary = LlamaRotaryEmbedding(transformers.AutoConfig.from_pretrained(folder))
    cos, sin = rotary(torch.zeros(1), torch.arange(LENGTH)[None])
    ours = read(raw)
    actual = build_cos_sin(LENGTH, 8, ours.rope_theta, ours.rope_scaling)
    expected = torch.cat((cos[0, :, :4], sin[0, :, :4]), dim=1)
    torch.testing.assert_close(actual, expected, rtol=0, atol=3e-5)
    return actual
