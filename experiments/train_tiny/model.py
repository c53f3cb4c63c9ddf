"""The model that is trained, in plain PyTorch: Qwen3's architecture on bytes, some layers with a sliding window.

Parameters have the names of the Hugging Face layout without the `model.` in front. Independent of fa_research's models,
which are compared with this one.

Shapes: B sequences, T tokens, E hidden, H query heads, K KV heads, D head dim, X vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention


@dataclass(frozen=True)
class ModelSettings:
    hidden_size: int = 256
    intermediate_size: int = 640
    num_layers: int = 8
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    max_context_len: int = 4096
    sliding_window: int = 512
    full_every: int = 4  # each 4th layer sees everything, the others a window
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    vocab_size: int = 256

    def is_sliding(self, layer: int) -> bool:
        return (layer + 1) % self.full_every != 0


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps) * self.weight).to(x.dtype)


def rotate(x_BHTD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """RoPE on halves, as Llama has it."""
    first, second = x_BHTD.float().chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x_BHTD.float() * cos_TD + turned * sin_TD).to(x_BHTD.dtype)


class Attention(nn.Module):
    def __init__(self, s: ModelSettings) -> None:
        super().__init__()
        self.s = s
        self.q_proj = nn.Linear(s.hidden_size, s.num_heads * s.head_dim, bias=False)
        self.k_proj = nn.Linear(s.hidden_size, s.num_kv_heads * s.head_dim, bias=False)
        self.v_proj = nn.Linear(s.hidden_size, s.num_kv_heads * s.head_dim, bias=False)
        self.o_proj = nn.Linear(s.num_heads * s.head_dim, s.hidden_size, bias=False)
        self.q_norm = RMSNorm(s.head_dim, s.rms_norm_eps)
        self.k_norm = RMSNorm(s.head_dim, s.rms_norm_eps)

    def forward(
        self, x_BTE: Tensor, cos_TD: Tensor, sin_TD: Tensor, window: BlockMask | Tensor | None
    ) -> Tensor:
        s, (batch, length, _) = self.s, x_BTE.shape
        # One product for all three: the weights stay apart, since Muon treats each matrix by itself.
        qkv = F.linear(x_BTE, torch.cat((self.q_proj.weight, self.k_proj.weight, self.v_proj.weight)))
        qkv = qkv.view(batch, length, -1, s.head_dim).transpose(1, 2)
        q, k, v = qkv.split((s.num_heads, s.num_kv_heads, s.num_kv_heads), dim=1)
        q, k = rotate(self.q_norm(q), cos_TD, sin_TD), rotate(self.k_norm(k), cos_TD, sin_TD)
        out = _attend(q, k, v, window)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))


def _attend(q: Tensor, k: Tensor, v: Tensor, window: BlockMask | Tensor | None) -> Tensor:
    """[B, H, T, D]. window: None (causal), flex_attention's block mask, or a dense mask [T, T]."""
    if isinstance(window, BlockMask):
        out = flex_attention(
            q.contiguous(), k.contiguous(), v.contiguous(), block_mask=window, enable_gqa=True
        )
        assert isinstance(out, Tensor)
        return out
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=window, is_causal=window is None)


class MLP(nn.Module):
    def __init__(self, s: ModelSettings) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(s.hidden_size, s.intermediate_size, bias=False)
        self.up_proj = nn.Linear(s.hidden_size, s.intermediate_size, bias=False)
        self.down_proj = nn.Linear(s.intermediate_size, s.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = F.linear(x, torch.cat((self.gate_proj.weight, self.up_proj.weight))).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class Layer(nn.Module):
    def __init__(self, s: ModelSettings, dropout: float) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(s), MLP(s)
        self.input_layernorm = RMSNorm(s.hidden_size, s.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(s.hidden_size, s.rms_norm_eps)
        self.dropout = dropout

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, window: BlockMask | Tensor | None) -> Tensor:
        drop = self.dropout if self.training else 0.0
        x = x + F.dropout(self.self_attn(self.input_layernorm(x), cos, sin, window), drop)
        return x + F.dropout(self.mlp(self.post_attention_layernorm(x)), drop)


class TinyModel(nn.Module):
    """dropout: of what attention and MLP add to the stream, in training."""

    def __init__(self, s: ModelSettings, dropout: float = 0.0) -> None:
        super().__init__()
        self.s = s
        self.embed_tokens = nn.Embedding(s.vocab_size, s.hidden_size)
        self.layers = nn.ModuleList(Layer(s, dropout) for _ in range(s.num_layers))
        self.norm = RMSNorm(s.hidden_size, s.rms_norm_eps)
        self.run_layer: Callable[..., Tensor] = _run_layer
        self.run_head: Callable[..., Tensor] = _head_nats
        nn.init.normal_(self.embed_tokens.weight, std=0.02)
        for layer in self.layers:
            assert isinstance(layer, Layer)
            for name, weight in layer.named_parameters():
                if weight.ndim == 2:  # what is added to the stream is nothing at first
                    ends = name.endswith(("o_proj.weight", "down_proj.weight"))
                    nn.init.zeros_(weight) if ends else nn.init.normal_(weight, std=weight.shape[1] ** -0.5)

    def compile_parts(self) -> None:
        """One layer of each kind is compiled and serves all of its kind: much faster to compile than the whole."""
        self.run_layer = torch.compile(_run_layer, dynamic=False)
        self.run_head = torch.compile(_head_nats, dynamic=False)

    def hidden(self, tokens_BT: Tensor, window: BlockMask | Tensor, dtype: torch.dtype) -> Tensor:
        x = self.embed_tokens(tokens_BT).to(dtype)
        cos, sin = cos_sin(self.s, tokens_BT.shape[1], x.device)
        for i, layer in enumerate(self.layers):
            x = self.run_layer(layer, x, cos, sin, window if self.s.is_sliding(i) else None)
        return x

    def nats(
        self, tokens_BT: Tensor, targets_BT: Tensor, window: BlockMask | Tensor, dtype: torch.dtype
    ) -> Tensor:
        """Cross entropy of every target, [B, T] float32. dtype: of the stream; products follow autocast."""
        return self.run_head(
            self.hidden(tokens_BT, window, dtype), self.norm, self.embed_tokens.weight, targets_BT
        )

    def logits(self, tokens_BT: Tensor) -> Tensor:
        """[B, T, X] float32, without compilation, for any T: for sampling and for tests."""
        run, self.run_layer = self.run_layer, _run_layer
        try:
            window = dense_window(tokens_BT.shape[1], self.s.sliding_window, tokens_BT.device)
            x = self.norm(self.hidden(tokens_BT, window, torch.float32))
        finally:
            self.run_layer = run
        return F.linear(x, self.embed_tokens.weight)


def _run_layer(
    layer: Layer, x: Tensor, cos: Tensor, sin: Tensor, window: BlockMask | Tensor | None
) -> Tensor:
    return layer(x, cos, sin, window)


def _head_nats(x: Tensor, norm: RMSNorm, weight_XE: Tensor, targets_BT: Tensor) -> Tensor:
    logits = F.linear(norm(x), weight_XE).float()
    return F.cross_entropy(logits.flatten(0, 1), targets_BT.flatten(), reduction="none").view_as(targets_BT)


def cos_sin(s: ModelSettings, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """[T, D] float32 each."""
    inverse = s.rope_theta ** -(torch.arange(0, s.head_dim, 2, device=device).float() / s.head_dim)
    angles = torch.outer(torch.arange(length, device=device).float(), inverse).repeat(1, 2)
    return angles.cos(), angles.sin()


def dense_window(length: int, window: int, device: torch.device) -> Tensor:
    """[T, T], true where a token (row) sees one of the last `window` tokens, itself among them."""
    positions = torch.arange(length, device=device)
    distance = positions[:, None] - positions[None, :]
    return (distance >= 0) & (distance < window)


def flex_window(length: int, window: int, device: torch.device) -> BlockMask:
    """The same for flex_attention, which skips blocks that nobody sees."""

    def seen(_b: Tensor, _h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (q - k < window)

    return create_block_mask(seen, None, None, length, length, device=device)
