"""The decoder against transformers' Llama and Qwen 3, with its weights copied over and a dense causal attention."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, Qwen3Config
from transformers import LlamaForCausalLM as PeerLlama
from transformers import Qwen3ForCausalLM as PeerQwen3

from fa_research.config import ModelConfig, RopeScaling, RopeType
from fa_research.models import Decoder, build_model

LLAMA_3 = RopeScaling(
    RopeType.llama3, factor=8.0, original_max_position=16
)  # every band of it within a short prompt
SMALL = ModelConfig(
    name="small", num_layers=3, hidden_size=96, num_heads=6, num_kv_heads=2, head_dim=32, intermediate_size=80,
    vocab_size=120, max_context_len=64, rope_theta=10000.0, rope_scaling=LLAMA_3,
)  # fmt: skip
VARIANTS = {
    "gqa": SMALL,
    "mha": dataclasses.replace(SMALL, num_kv_heads=6),
    "mqa": dataclasses.replace(SMALL, num_kv_heads=1),
    "tied": dataclasses.replace(SMALL, tie_word_embeddings=True),
    "plain-rope": dataclasses.replace(SMALL, rope_scaling=RopeScaling()),
    "qk-norm": dataclasses.replace(SMALL, qk_norm=True, rms_norm_eps=1e-3),
    "qk-norm-tied": dataclasses.replace(SMALL, qk_norm=True, tie_word_embeddings=True),
}


class DenseAttention:
    """`Attend` over one whole causal sequence, written plainly; remembers what the model gave it."""

    def __init__(self, num_tokens: int) -> None:
        self.positions_T = torch.arange(num_tokens)
        self.calls: list[tuple[int, Tensor | None, Tensor | None]] = []

    def __call__(
        self,
        layer_id: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        rope: Tensor | None,
        sinks_H: Tensor | None = None,
    ) -> Tensor:
        self.calls.append((layer_id, rope, sinks_H))
        if rope is not None:
            table = rope[self.positions_T.to(rope.device)].to(q.dtype)[:, None]
            cos, sin = (part.repeat(1, 1, 2) for part in table.chunk(2, dim=-1))
            q, k = (x * cos + torch.cat((-x.chunk(2, -1)[1], x.chunk(2, -1)[0]), -1) * sin for x in (q, k))
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))
        if sinks_H is not None:
            sink = sinks_H[:, None, None].expand(-1, scores.shape[1], 1)
            scores = torch.cat((scores, sink), dim=-1)
        weights = scores.softmax(-1)[..., : k.shape[0]]
        return torch.einsum("hqk,khd->qhd", weights, v)


def peer(config: ModelConfig) -> torch.nn.Module:
    """The same model in transformers, with random weights (norms too, so that a swapped one shows)."""
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling.type is RopeType.llama3:
        rope |= {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        rope["original_max_position_embeddings"] = config.rope_scaling.original_max_position
    config_class, model_class = (Qwen3Config, PeerQwen3) if config.qk_norm else (LlamaConfig, PeerLlama)
    model = model_class(
        config_class(
            vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers, num_attention_heads=config.num_heads, head_dim=config.head_dim,
            num_key_value_heads=config.num_kv_heads, rms_norm_eps=config.rms_norm_eps, rope_parameters=rope,
            max_position_embeddings=config.max_context_len, tie_word_embeddings=config.tie_word_embeddings,
        )
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(1.0 if "norm" in name else 0.0, 0.2)
    return model.eval()


def copy_weights(model: Decoder, theirs: dict[str, Tensor]) -> None:
    """Every weight of theirs to its place in ours."""
    ours: dict[str, Tensor] = {
        "embedding": theirs["model.embed_tokens.weight"],
        "final_norm_E": theirs["model.norm.weight"],
        "head": theirs["lm_head.weight"],
    }
    for i in range(model.config.num_layers):
        layer = {name.split(f"layers.{i}.")[1]: w for name, w in theirs.items() if f"layers.{i}." in name}
        attention = {name.split(".")[1]: w for name, w in layer.items() if name.startswith("self_attn")}
        mlp = {name.split(".")[1]: w for name, w in layer.items() if name.startswith("mlp")}
        ours[f"layers.{i}.input_norm_E"] = layer["input_layernorm.weight"]
        ours[f"layers.{i}.mlp_norm_E"] = layer["post_attention_layernorm.weight"]
        ours[f"layers.{i}.qkv"] = torch.cat([attention[f"{name}_proj"] for name in "qkv"])
        ours[f"layers.{i}.o"] = attention["o_proj"]
        ours[f"layers.{i}.mlp.gate_up"] = torch.cat([mlp["gate_proj"], mlp["up_proj"]])
        ours[f"layers.{i}.mlp.down"] = mlp["down_proj"]
        if model.config.qk_norm:
            ours[f"layers.{i}.q_norm_D"], ours[f"layers.{i}.k_norm_D"] = (
                attention["q_norm"],
                attention["k_norm"],
            )
    model.load_state_dict(ours)


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_logits_are_those_of_transformers(config: ModelConfig) -> None:
    theirs = peer(config)
    model = Decoder(config, dtype=torch.float32, device="cpu")
    copy_weights(model, theirs.state_dict())
    ids = torch.randint(0, config.vocab_size, (40,))
    with torch.no_grad():
        expected = theirs(ids[None]).logits[0]
    attend = DenseAttention(40)
    logits = model.compute_logits(model(ids, attend))
    assert expected.std() > 0.5  # large enough for the tolerance to mean something
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert [layer_id for layer_id, _, _ in attend.calls] == [0, 1, 2]
    assert all(rope is model.cos_sin_XD and sinks is None for _, rope, sinks in attend.calls)


def test_float64_is_float64_throughout() -> None:
    """The oracle's model: far closer to a float64 peer than float32 arithmetic could be, bar the float32 rope table."""
    config = dataclasses.replace(SMALL, num_layers=1)
    model = build_model(config, dtype=torch.float64, device="cpu", seed=0)
    ids = torch.arange(12)
    hidden = model(ids, DenseAttention(12))
    assert hidden.dtype == torch.float64

    def norm(x: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()

    layer, residual = model.layers[0], model.embedding[ids]
    q, k, v = (norm(residual) @ layer.qkv.T).view(12, -1, 32).split([6, 2, 2], dim=1)
    attended = DenseAttention(12)(0, q, k, v, rope=model.cos_sin_XD)
    residual = residual + attended.reshape(12, -1) @ layer.o.T
    gate, up = (norm(residual) @ layer.mlp.gate_up.T).chunk(2, dim=-1)
    residual = residual + (gate * gate.sigmoid() * up) @ layer.mlp.down.T
    torch.testing.assert_close(hidden, norm(residual), rtol=1e-12, atol=1e-12)


def test_sinks_reach_the_attention() -> None:
    config = dataclasses.replace(SMALL, sink=True)
    model = build_model(config, dtype=torch.float32, device="cpu", seed=0)
    ids, attend = torch.arange(9), DenseAttention(9)
    with_small_sinks = model(ids, attend)
    assert [
        sinks is layer.sinks_H for (_, _, sinks), layer in zip(attend.calls, model.layers, strict=True)
    ] == [True] * 3
    model.layers[2].sinks_H.fill_(50.0)  # all of the last layer's attention goes to the sink
    assert not torch.allclose(model(ids, DenseAttention(9)), with_small_sinks, atol=1e-3)
    assert all(spec.has_sink for spec in model.attention_specs)


def test_random_weights_come_from_the_seed() -> None:
    config = dataclasses.replace(SMALL, qk_norm=True, sink=True, hidden_size=256, intermediate_size=512)
    first, again, other = (build_model(config, dtype=torch.float32, device="cpu", seed=s) for s in (3, 3, 4))
    for (name, weight), same, different in zip(
        first.named_parameters(), again.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(weight, same)
        if "_norm_" in name:
            assert bool((weight == 1).all())
        else:
            assert not torch.equal(weight, different)
            assert abs(float(weight.mean())) < 0.02
            assert weight.numel() < 1000 or 0.019 < float(weight.std()) < 0.021
    weights = dict(first.named_parameters())
    assert not torch.equal(weights["layers.0.qkv"], weights["layers.1.qkv"])


def test_inference_only() -> None:
    model = build_model(SMALL, dtype=torch.float32, device="cpu", seed=0)
    assert not any(weight.requires_grad for weight in model.parameters())
    assert not model.compute_logits(model(torch.arange(5), DenseAttention(5))).requires_grad


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("qk_norm", [False, True])
def test_fused_kernels_on_the_gpu_are_as_good_as_torch(qk_norm: bool) -> None:
    """bfloat16 through the Triton kernels errs at most twice as much against float64 as plain torch in bfloat16."""
    config = dataclasses.replace(
        SMALL, hidden_size=512, num_heads=8, head_dim=128, intermediate_size=1408, qk_norm=qk_norm
    )
    on_gpu = build_model(config, dtype=torch.bfloat16, device="cuda", seed=0)
    ids, states = torch.randint(0, 120, (50,)), {name: w.cpu() for name, w in on_gpu.state_dict().items()}

    def run(dtype: torch.dtype) -> Tensor:
        model = Decoder(config, dtype=dtype, device="cpu")
        model.load_state_dict(states)
        return model(ids, DenseAttention(50)).double()

    exact, plain = run(torch.float64), run(torch.bfloat16)
    fused = on_gpu(ids.cuda(), DenseAttention(50)).cpu().double()
    assert float((fused - exact).abs().max()) <= 2 * float((plain - exact).abs().max()) + 1e-3
    assert float((fused - exact).square().mean()) <= 2 * float((plain - exact).square().mean())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_weights_are_allocated_once_on_the_gpu() -> None:
    config = dataclasses.replace(SMALL, hidden_size=2048, intermediate_size=8192, num_layers=4)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = build_model(config, dtype=torch.bfloat16, device="cuda", seed=0)
    assert torch.cuda.max_memory_allocated() - before < 1.02 * model.weight_bytes
