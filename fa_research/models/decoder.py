"""The decoder that all supported architectures share, for inference only and blind to attention backends. What tells
them apart is in `ModelConfig`: norms, biases, activation, masks and rotations of layers, experts, scales and softcaps.

Legend: T tokens of the ragged batch, D head dim, E hidden size, M tokens that get logits, X positions of the table."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fa_research.config import ModelConfig, RopeScaling
from fa_research.kernels import ops
from fa_research.models.layers import DecoderLayer, attention_specs, new_weight, norm_dtype
from fa_research.models.moe import MoE
from fa_research.models.rope import build_cos_sin

if TYPE_CHECKING:
    from fa_research.attention.layer import Attend

INIT_STD = 0.02


class Decoder(nn.Module):
    """Embedding, layers, final norm and head. The weights are uninitialised until `init_random_` fills them.

    ``rope_len``: the longest sequence that the model will see, in tokens, for rotations that depend on it (dynamic NTK,
    LongRoPE); None: ``max_context_len``. Chosen once, as keys that are cached stay rotated as they are.

    Attributes:
        attention_specs: one per layer, what a backend must be able to do.
        cos_sin_XD: the rotation of every position up to ``max_context_len``, float32 [X, D].
        local_cos_sin_XD: that of the local layers, where it is another one.
        notes: what differs from the config that was given, for the row.
    """

    cos_sin_XD: Tensor
    local_cos_sin_XD: Tensor | None

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        rope_len: int | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.notes: list[str] = []
        self.attention_specs = attention_specs(config)
        self.embedding = new_weight(config.vocab_size, config.hidden_size, dtype=dtype, device=device)
        # Rounded as transformers rounds it: a checkpoint was trained with the rounded one.
        self.embedding_scale = torch.tensor(config.embedding_scale, dtype=dtype).item()
        self.layers = nn.ModuleList(
            DecoderLayer(config, i, dtype=dtype, device=device) for i in range(config.num_layers)
        )
        self.final_norm_E = new_weight(config.hidden_size, dtype=norm_dtype(dtype), device=device)
        tied = config.tie_word_embeddings
        self.head = self.embedding if tied else new_weight(*self.embedding.shape, dtype=dtype, device=device)
        self._build_tables(device, rope_len)

    def _build_tables(self, device: torch.device | str, rope_len: int | None) -> None:
        config, theta = self.config, self.config.local.rope_theta
        shape = config.max_context_len, config.head_dim
        table = build_cos_sin(*shape, config.rope_theta, config.rope_scaling, device, rope_len=rope_len)
        self.register_buffer("cos_sin_XD", table, persistent=False)
        own = None
        if theta is not None and any(config.local.pattern):
            own = build_cos_sin(*shape, theta, RopeScaling(), device)
        self.register_buffer("local_cos_sin_XD", own, persistent=False)

    def forward(self, input_ids_T: Tensor, attend: Attend, rows_M: Tensor | None = None) -> Tensor:
        """Hidden states after the final norm, for token ids [T] (int32 or int64) of a ragged batch: [T, E],
        or [M, E] for the tokens ``rows_M`` alone. Prefill wants each request's last one: the last layer's
        MLP, a share of 1 / L of the work, is then done for a few tokens instead of all."""
        residual_TE = F.embedding(input_ids_T, self.embedding)
        if self.embedding_scale != 1:
            residual_TE.mul_(self.embedding_scale)
        x_TE: Tensor | None = None
        for layer in self.layers:
            assert isinstance(layer, DecoderLayer)
            wanted = rows_M if layer is self.layers[-1] else None
            own = self.local_cos_sin_XD if layer.is_local else None
            table = self.cos_sin_XD if own is None else own
            x_TE, residual_TE = layer(x_TE, residual_TE, table, attend, wanted)
        assert x_TE is not None, "a model has at least one layer"
        return ops.add_rms_norm(x_TE, residual_TE, self.final_norm_E, self.config.rms_norm_eps)

    def compute_logits(self, hidden_TE: Tensor) -> Tensor:
        """[..., vocabulary] in the model's dtype. Pass only the tokens to be sampled: logits are large."""
        logits = F.linear(hidden_TE, self.head)
        return ops.softcap(logits, self.config.logit_softcap) if self.config.logit_softcap else logits

    def untie(self, head: Tensor) -> None:
        """Take `head` (of the embedding's shape, dtype and device) in place of the embedding, in the config too."""
        assert (head.shape, head.dtype) == (self.embedding.shape, self.embedding.dtype)
        self.head = nn.Parameter(head, requires_grad=False)
        self.config = dataclasses.replace(self.config, tie_word_embeddings=False)
        self.notes.append(
            "config.json ties lm_head to the embedding, but the files hold another lm_head: both are used, as in "
            "transformers"
        )

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
        follows the last layer's attention is computed for those alone. Of a mixture, the experts of each token."""
        layer, moe = self.layers[0], self.config.moe
        assert isinstance(layer, DecoderLayer)
        mlp = layer.mlp.gate_up.numel() + layer.mlp.down.numel()
        if isinstance(layer.mlp, MoE):
            mlp = layer.mlp.router.numel() + mlp * moe.experts_per_token // moe.num_experts
        rest = layer.o.numel() + mlp
        every_layer = (layer.qkv.numel() + rest) * num_tokens * len(self.layers)
        return every_layer - rest * (num_tokens - num_rows) + self.head.numel() * num_rows

    def step_weight_bytes(self, num_tokens: int, num_rows: int) -> int:
        """Bytes of weights that such a pass reads: all but the embedding table, of which it reads a row a token, and
        the experts that no token takes. With k of N experts a token, drawn at random, T tokens are expected to take
        N (1 - (1 - k / N)^T) of them."""
        idle, moe = 0.0, self.config.moe
        for layer in self.layers:
            assert isinstance(layer, DecoderLayer)
            if isinstance(layer.mlp, MoE):
                tokens = num_rows if layer is self.layers[-1] else num_tokens
                weights = layer.mlp.named_parameters()
                experts = sum(w.nbytes for name, w in weights if not name.startswith("router"))
                idle += experts * (1 - moe.experts_per_token / moe.num_experts) ** tokens
        table = 0 if self.head is self.embedding else self.embedding.nbytes
        return self.weight_bytes - table - round(idle)
