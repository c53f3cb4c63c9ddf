"""One layer of the shared decoder, and what it asks of attention.

Legend: T tokens of the ragged batch, H query heads, K KV heads, D head dim, V value head dim, E hidden size,
F intermediate size, M tokens that get logits, X positions of the table.

A dense layer of the Llama family is four matrix products (Q, K and V fused; gate and up fused) and three fused
elementwise kernels around the attention, which comes in as a function (`fa_research.attention.layer.Attend`) and does
the rotation and the cache too. Norm weights are float32 whatever the model's dtype. Architectures: Touvron et al.,
"LLaMA" (2023); Gemma Team, "Gemma 2" (2024) and "Gemma 3" (2025); OpenAI, "gpt-oss" (2025)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fa_research import masks
from fa_research.config import MaskConfig, ModelConfig
from fa_research.kernels import ops
from fa_research.models.moe import MoE
from fa_research.spec import AttentionSpec

if TYPE_CHECKING:
    from fa_research.attention.layer import Attend


def is_local(config: ModelConfig, layer_id: int) -> bool:
    """Whether a layer has the mask, and the rotation if it has its own, of `config.local`."""
    pattern = config.local.pattern
    return bool(pattern) and pattern[layer_id % len(pattern)]


def attention_specs(config: ModelConfig) -> tuple[AttentionSpec, ...]:
    """What each layer asks of a backend, first to last. Allocates nothing: attention can be studied at the
    shapes of models that do not fit. Raises ValueError for an unknown mask or heads that do not divide."""

    def spec(mask: MaskConfig) -> AttentionSpec:
        scale = config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
        return AttentionSpec(
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            v_head_dim=config.head_dim,
            scale=scale,
            softcap=config.softcap,
            mask=masks.build(mask.name, mask.size, mask.options),
            has_sink=config.sink,
        )

    local = [is_local(config, i) for i in range(config.num_layers)]
    kinds = {True: config.local.mask, False: config.mask}
    specs = {kind: spec(kinds[kind]) for kind in set(local)}
    return tuple(specs[kind] for kind in local)


def new_weight(*shape: int, dtype: torch.dtype, device: torch.device | str) -> nn.Parameter:
    """Uninitialised, on the device and in the dtype it stays in: the weights of a large model exist only
    once."""
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)


def norm_dtype(dtype: torch.dtype) -> torch.dtype:
    """Norm weights are float32, as 1 + w needs more bits than a checkpoint's w has (Gemma); for float64 they follow."""
    return torch.promote_types(dtype, torch.float32)


class MLP(nn.Module):
    """``down(act(gate x) * up x)``."""

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        self.activation = config.activation.value
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_up = new_weight(2 * inner, hidden, dtype=dtype, device=device)  # rows: all of gate, then up
        self.down = new_weight(hidden, inner, dtype=dtype, device=device)

    def forward(self, x_TE: Tensor) -> Tensor:
        return F.linear(ops.glu(F.linear(x_TE, self.gate_up), self.activation), self.down)


class DecoderLayer(nn.Module):
    """One decoder layer. It takes the residual stream, and what is still to be added to it, apart: the
    addition is fused with the norm that follows."""

    def __init__(
        self, config: ModelConfig, layer_id: int, *, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        super().__init__()
        self.layer_id, self.is_local = layer_id, is_local(config, layer_id)
        self.eps = config.rms_norm_eps
        self.heads = [config.num_heads, config.num_kv_heads, config.num_kv_heads]
        self.head_dim, hidden = config.head_dim, config.hidden_size

        def matrix(*shape: int) -> nn.Parameter:
            return new_weight(*shape, dtype=dtype, device=device)

        def norm(width: int) -> nn.Parameter:
            return new_weight(width, dtype=norm_dtype(dtype), device=device)

        self.input_norm_E = norm(hidden)
        self.qkv = matrix(sum(self.heads) * self.head_dim, hidden)  # rows: all of q, then k, then v
        self.qkv_bias = matrix(self.qkv.shape[0]) if config.qkv_bias else None
        self.q_norm_D = norm(self.head_dim) if config.qk_norm else None
        self.k_norm_D = norm(self.head_dim) if config.qk_norm else None
        self.sinks_H = matrix(config.num_heads) if config.sink else None
        self.o = matrix(hidden, config.num_heads * self.head_dim)
        self.o_bias = matrix(hidden) if config.o_bias else None
        self.post_attention_norm_E = norm(hidden) if config.post_norms else None
        self.mlp_norm_E = norm(hidden)
        mlp = MoE if config.moe.num_experts else MLP
        self.mlp = mlp(config, dtype=dtype, device=device)
        self.post_mlp_norm_E = norm(hidden) if config.post_norms else None

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
        x_TE = self._post_norm(F.linear(attention, self.o, self.o_bias), self.post_attention_norm_E)
        x_TE = ops.add_rms_norm(x_TE, residual_TE, self.mlp_norm_E, self.eps)
        return self._post_norm(self.mlp(x_TE), self.post_mlp_norm_E), residual_TE

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

    def _post_norm(self, x_TE: Tensor, weight_E: Tensor | None) -> Tensor:
        return x_TE if weight_E is None else ops.rms_norm(x_TE, weight_E, self.eps, out=x_TE)
