"""The Llama family of decoders (Llama, Mistral, Qwen 2 with ``qkv_bias``, Qwen 3 with ``qk_norm``), for inference
only and blind to attention backends.

Legend: T tokens of the ragged batch, H query heads, K KV heads, D head dim, V value head dim, E hidden size,
F intermediate size.

A layer is four matrix products (Q, K and V fused; gate and up fused) and three fused elementwise kernels
around the attention, which comes in as a function (`fa_research.attention.layer.Attend`) and does the
rotation and the cache too. Architecture: Touvron et al., "LLaMA" (2023); Grattafiori et al., "The Llama 3
Herd of Models" (2024)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fa_research import masks
from fa_research.config import ModelConfig
from fa_research.kernels import ops
from fa_research.models.rope import build_cos_sin
from fa_research.spec import AttentionSpec

if TYPE_CHECKING:
    from fa_research.attention.layer import Attend

INIT_STD = 0.02


def attention_specs(config: ModelConfig) -> tuple[AttentionSpec, ...]:
    """What each layer asks of a backend, first to last. Allocates nothing: attention can be studied at the
    shapes of models that do not fit. Raises ValueError for an unknown mask or heads that do not divide."""
    spec = AttentionSpec(
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        v_head_dim=config.head_dim,
        scale=config.head_dim**-0.5,
        softcap=config.softcap,
        mask=masks.build(config.mask.name, config.mask.size),
        has_sink=config.sink,
    )
    return (spec,) * config.num_layers


def _weight(*shape: int, dtype: torch.dtype, device: torch.device | str) -> nn.Parameter:
    """Uninitialised, on the device and in the dtype it stays in: the weights of a large model exist only
    once."""
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)


class DecoderLayer(nn.Module):
    """One decoder layer. It takes the residual stream, and what is still to be added to it, apart: the
    addition is fused with the norm that follows."""

    def __init__(
        self, config: ModelConfig, layer_id: int, *, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        super().__init__()
        self.layer_id = layer_id
        self.eps = config.rms_norm_eps
        self.heads = [config.num_heads, config.num_kv_heads, config.num_kv_heads]
        self.head_dim = config.head_dim

        def weight(*shape: int) -> nn.Parameter:
            return _weight(*shape, dtype=dtype, device=device)

        hidden, inner = config.hidden_size, config.intermediate_size
        self.input_norm_E = weight(hidden)
        self.qkv = weight(sum(self.heads) * self.head_dim, hidden)  # rows: all of q, then k, then v
        self.qkv_bias = weight(self.qkv.shape[0]) if config.qkv_bias else None
        self.q_norm_D = weight(self.head_dim) if config.qk_norm else None
        self.k_norm_D = weight(self.head_dim) if config.qk_norm else None
        self.sinks_H = weight(config.num_heads) if config.sink else None
        self.o = weight(hidden, config.num_heads * self.head_dim)
        self.mlp_norm_E = weight(hidden)
        self.gate_up = weight(2 * inner, hidden)  # rows: all of gate, then up
        self.down = weight(hidden, inner)

    def forward(
        self,
        x_TE: Tensor | None,
        residual_TE: Tensor,
        cos_sin_XD: Tensor,
        attend: Attend,
        rows_M: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Adds ``x_TE`` (the layer before; None in the first layer) and the attention to ``residual_TE`` in
        place; returns the output of the MLP, not yet added, and the residual. Given ``rows_M`` (the last
        layer), what follows the attention is computed for these rows only."""
        if x_TE is None:
            x_TE = ops.rms_norm(residual_TE, self.input_norm_E, self.eps)
        else:
            x_TE = ops.add_rms_norm(x_TE, residual_TE, self.input_norm_E, self.eps)
        attention = self._attention(x_TE, cos_sin_XD, attend)
        if rows_M is not None:
            attention, residual_TE = attention[rows_M], residual_TE[rows_M]
        x_TE = F.linear(attention, self.o)
        x_TE = ops.add_rms_norm(x_TE, residual_TE, self.mlp_norm_E, self.eps)
        return F.linear(ops.silu_mul(F.linear(x_TE, self.gate_up)), self.down), residual_TE

    def _attention(self, x_TE: Tensor, cos_sin_XD: Tensor, attend: Attend) -> Tensor:
        """The heads' outputs side by side, [T, H * V]."""
        num_tokens = x_TE.shape[0]
        qkv = F.linear(x_TE, self.qkv, self.qkv_bias).view(num_tokens, -1, self.head_dim)
        q_THD, k_TKD, v_TKD = qkv.split(self.heads, dim=1)  # views: the kernels take strided tokens
        if self.q_norm_D is not None and self.k_norm_D is not None:
            ops.rms_norm(q_THD, self.q_norm_D, self.eps, out=q_THD)
            ops.rms_norm(k_TKD, self.k_norm_D, self.eps, out=k_TKD)
        out_THV = attend(self.layer_id, q_THD, k_TKD, v_TKD, rope=cos_sin_XD, sinks_H=self.sinks_H)
        return out_THV.reshape(num_tokens, -1)


class Decoder(nn.Module):
    """Embedding, layers, final norm and head. The weights are uninitialised until `init_random_` fills them.

    Attributes:
        attention_specs: one per layer, what a backend must be able to do.
        cos_sin_XD: the rotation of every position up to ``max_context_len``, float32 [X, D].
    """

    cos_sin_XD: Tensor

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        self.config = config
        self.attention_specs = attention_specs(config)
        self.embedding = _weight(config.vocab_size, config.hidden_size, dtype=dtype, device=device)
        self.layers = nn.ModuleList(
            DecoderLayer(config, i, dtype=dtype, device=device) for i in range(config.num_layers)
        )
        self.final_norm_E = _weight(config.hidden_size, dtype=dtype, device=device)
        tied = config.tie_word_embeddings
        self.head = self.embedding if tied else _weight(*self.embedding.shape, dtype=dtype, device=device)
        table = build_cos_sin(
            config.max_context_len, config.head_dim, config.rope_theta, config.rope_scaling, device
        )
        self.register_buffer("cos_sin_XD", table, persistent=False)

    def forward(self, input_ids_T: Tensor, attend: Attend, rows_M: Tensor | None = None) -> Tensor:
        """Hidden states after the final norm, for token ids [T] (int32 or int64) of a ragged batch: [T, E],
        or [M, E] for the tokens ``rows_M`` alone. Prefill wants each request's last one: the last layer's
        MLP, a share of 1 / L of the work, is then done for a few tokens instead of all."""
        residual_TE = F.embedding(input_ids_T, self.embedding)
        x_TE: Tensor | None = None
        for layer in self.layers:
            wanted = rows_M if layer is self.layers[-1] else None
            x_TE, residual_TE = layer(x_TE, residual_TE, self.cos_sin_XD, attend, wanted)
        assert x_TE is not None, "a model has at least one layer"
        return ops.add_rms_norm(x_TE, residual_TE, self.final_norm_E, self.config.rms_norm_eps)

    def compute_logits(self, hidden_TE: Tensor) -> Tensor:
        """[..., vocabulary] in the model's dtype. Pass only the tokens to be sampled: logits are large."""
        return F.linear(hidden_TE, self.head)

    @torch.no_grad()
    def init_random_(self, seed: int) -> None:
        """Matrices, biases and sinks normal with standard deviation 0.02, norm weights 1. The same seed gives the
        same weights on the same type of device in the same dtype."""
        generator = torch.Generator(device=self.embedding.device).manual_seed(seed)
        for name, weight in self.named_parameters():
            if "_norm_" in name:
                weight.fill_(1.0)
            else:
                weight.normal_(std=INIT_STD, generator=generator)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights; a tied head counts once."""
        return sum(weight.nbytes for weight in self.parameters())

    def multiply_adds(self, num_tokens: int, num_rows: int) -> int:
        """Multiply-adds of the matrix products of a pass over `num_tokens` tokens of which `num_rows` get logits: what
        follows the last layer's attention is computed for those alone."""
        layer = self.layers[0]
        assert isinstance(layer, DecoderLayer)
        rest = layer.o.numel() + layer.gate_up.numel() + layer.down.numel()
        every_layer = (layer.qkv.numel() + rest) * num_tokens * len(self.layers)
        return every_layer - rest * (num_tokens - num_rows) + self.head.numel() * num_rows

    @property
    def step_weight_bytes(self) -> int:
        """Bytes of weights that one decode step reads: all but the embedding table, of which it reads a row a
        token."""
        return self.weight_bytes - (0 if self.head is self.embedding else self.embedding.nbytes)
