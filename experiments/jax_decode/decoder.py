"""The Llama family of decoders in JAX, on the weights of a torch `Decoder` where they lie, over a paged cache.

Attention is `kernels.jax_paged` (XLA), or any backend of the package through `interop.jax`. An extend pass takes its
numbers from the host; a decode step takes them from the step before.

Legend: T query tokens, B requests, H query heads, K KV heads, D head dim, E hidden size, L layers, N slots, P pages of
a request, X positions of the rope table.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fa_research.interop.dlpack import to_jax
from fa_research.interop.jax import paged_attention as through_a_backend
from fa_research.interop.share import share_weights
from fa_research.kernels.jax_paged import paged_attention as with_xla
from fa_research.models import Decoder

TILE = 32  # queries a tile of an extend pass
LAYER = re.compile(r"layers\.(\d+)\.(?:mlp\.)?(\w+)")
# What this decoder computes of a layer; a weight of another name means another architecture.
OF_A_LAYER = {
    "input_norm_E",
    "qkv",
    "qkv_bias",
    "q_norm_D",
    "k_norm_D",
    "sinks_H",
    "o",
    "mlp_norm_E",
    "gate_up",
    "down",
}
HIGHEST = lax.Precision.HIGHEST


class JaxDecoder:
    """Greedy decoding of one batch at a time. `attention` is "xla", or the name of a backend of the package.

    Raises ValueError for a model that is not of the Llama family, InteropError for weights that cannot be shared."""

    def __init__(
        self, model: Decoder, *, page_size: int = 16, num_pages: int = 256, attention: str = "xla"
    ) -> None:
        self.config, self.page_size = model.config, page_size
        self.weights = share_model(model)
        config = model.config
        shape = (config.num_layers, (num_pages + 1) * page_size, config.num_kv_heads, config.head_dim)
        dtype, device = self.weights["embedding"].dtype, next(iter(self.weights["embedding"].devices()))
        self._pools = [jax.device_put(jnp.zeros(shape, dtype), device) for _ in range(2)]
        # Page 0 is nobody's, as in the package's own pools: padding writes there.
        self._free = list(np.random.default_rng(0).permutation(np.arange(1, num_pages + 1)))
        on = "cpu" if device.platform == "cpu" else "cuda"
        known = {
            "specs": model.attention_specs, "eps": config.rms_norm_eps, "attention": attention, "device": on,
            "page_size": page_size,
        }  # fmt: skip
        self._extend = jax.jit(functools.partial(forward, one_token=False, **known), donate_argnums=(1, 2))
        self._step = jax.jit(functools.partial(step, **known), donate_argnums=(1, 2))

    def generate(self, prompts: Sequence[Sequence[int]], steps: int) -> np.ndarray:
        """Greedy tokens [B, steps] after the prompts."""
        tokens = [self.start(prompts, steps)]
        for _ in range(1, steps):
            tokens.append(self.step(tokens[-1]))
        self.finish()
        return np.stack([np.asarray(token) for token in tokens], axis=1)

    def start(self, prompts: Sequence[Sequence[int]], steps: int) -> Any:
        """Prefill; the first tokens [B] of `steps`, for which there are pages then. Raises ValueError where the rope
        table or the pool is too short for them."""
        lens_B = np.array([len(prompt) for prompt in prompts])
        longest, positions = int(lens_B.max()) + steps, self.weights["cos_sin_XD"].shape[0]
        if longest > positions:
            raise ValueError(
                f"a prompt and {steps} steps make {longest} tokens, model.max_context_len={positions}"
            )
        tokens_T = np.concatenate([np.asarray(prompt) for prompt in prompts])
        return self._prefill(tokens_T, lens_B, self._pages(lens_B + steps))

    def step(self, last_B: Any) -> Any:
        """The tokens [B] after those of the step before. Nothing comes from the host."""
        next_B, self.lens_B, *self._pools = self._step(
            self.weights, *self._pools, last_B, self.lens_B, self.table_BP
        )
        return next_B

    def finish(self) -> None:
        """The pages are free again."""
        self._free += [page for page in np.asarray(self.table_BP).flatten().tolist() if page]

    def _prefill(self, tokens_T: np.ndarray, lens_B: np.ndarray, table_BP: np.ndarray) -> Any:
        """From position 0; the next token of each request, [B]."""
        positions_T = np.concatenate([np.arange(n) for n in lens_B])
        rows_T = np.repeat(np.arange(len(lens_B)), lens_B)
        slots_T = (
            table_BP[rows_T, positions_T // self.page_size] * self.page_size + positions_T % self.page_size
        )
        cu_seqlens_B1 = np.concatenate([[0], np.cumsum(lens_B)])
        self.lens_B, self.table_BP = (jnp.asarray(x, dtype=jnp.int32) for x in (lens_B, table_BP))
        numbers = (jnp.asarray(x, dtype=jnp.int32) for x in (tokens_T, positions_T, slots_T))
        batch = (self.table_BP, self.lens_B, jnp.asarray(cu_seqlens_B1, dtype=jnp.int32))
        next_B, *self._pools = self._extend(self.weights, *self._pools, *numbers, *batch)
        return next_B

    def _pages(self, lens_B: np.ndarray) -> np.ndarray:
        counts = -(-lens_B // self.page_size)
        if counts.sum() > len(self._free):
            raise ValueError(
                f"{counts.sum()} pages of {self.page_size} tokens are needed, num_pages leaves {len(self._free)}"
            )
        table = np.zeros((len(lens_B), counts.max()), dtype=np.int32)
        for row, count in enumerate(counts):
            table[row, :count] = [self._free.pop() for _ in range(count)]
        return table


def share_model(model: Decoder) -> dict[str, Any]:
    """The weights as a pytree: what is of the whole model by its name, `layers` a list of dicts."""
    config = model.config
    changed = {
        "activation": config.activation.value != "silu",
        "embedding_scale": config.embedding_scale != 1,
        "logit_softcap": config.logit_softcap != 0,
        "local.rope_theta": bool(config.local.pattern) and config.local.rope_theta is not None,
    }
    if any(changed.values()):
        names = ", ".join(f"model.{name}" for name, is_changed in changed.items() if is_changed)
        raise ValueError(f"{config.name}: this decoder computes the Llama family, without {names}")
    shared: dict[str, Any] = {"cos_sin_XD": to_jax(model.cos_sin_XD), "layers": []}
    shared["layers"] = [{} for _ in range(model.config.num_layers)]
    for name, array in share_weights(model).items():
        match = LAYER.fullmatch(name)
        if match and match[2] in OF_A_LAYER:
            shared["layers"][int(match[1])][match[2]] = array
        elif name in ("embedding", "final_norm_E", "head"):
            shared[name] = array
        else:
            raise ValueError(f"{model.config.name}: this decoder computes the Llama family, not {name}")
    shared.setdefault("head", shared["embedding"])
    return shared


def step(
    weights: dict[str, Any],
    k_LNKD: Any,
    v_LNKD: Any,
    last_B: Any,
    lens_B: Any,
    table_BP: Any,
    *,
    page_size: int,
    **known: Any,
) -> tuple[Any, Any, Any, Any]:
    """One decode step: the next tokens [B] after `last_B`, the lengths with them, and the pools."""
    rows_B = jnp.arange(len(lens_B), dtype=jnp.int32)
    slots_B = table_BP[rows_B, lens_B // page_size] * page_size + lens_B % page_size
    batch = (table_BP, lens_B + 1, jnp.arange(len(lens_B) + 1, dtype=jnp.int32))
    next_B, k_LNKD, v_LNKD = forward(
        weights, k_LNKD, v_LNKD, last_B, lens_B, slots_B, *batch, page_size=page_size, one_token=True, **known
    )
    return next_B, lens_B + 1, k_LNKD, v_LNKD


def forward(
    weights: dict[str, Any],
    k_LNKD: Any,
    v_LNKD: Any,
    tokens_T: Any,
    positions_T: Any,
    slots_T: Any,
    table_BP: Any,
    lens_B: Any,
    cu_seqlens_q_B1: Any,
    *,
    specs: Sequence[Any],
    eps: float,
    attention: str,
    device: str,
    page_size: int,
    one_token: bool,
) -> tuple[Any, Any, Any]:
    """The most likely next token of each request [B], and the pools with what the tokens added."""
    attend = _xla if attention == "xla" else functools.partial(_backend, name=attention, device=device)
    batch = (table_BP, lens_B, cu_seqlens_q_B1)
    x_TE = weights["embedding"][tokens_T]
    cos_sin_TD = weights["cos_sin_XD"][positions_T]
    for i, (layer, spec) in enumerate(zip(weights["layers"], specs, strict=True)):
        normed = rms_norm(x_TE, layer["input_norm_E"], eps)
        qkv = linear(normed, layer["qkv"]) + layer.get("qkv_bias", 0)
        heads = [spec.num_heads, spec.num_heads + spec.num_kv_heads]
        q, k, v = jnp.split(qkv.reshape(x_TE.shape[0], -1, spec.head_dim), heads, axis=1)
        if "q_norm_D" in layer:
            q, k = rms_norm(q, layer["q_norm_D"], eps), rms_norm(k, layer["k_norm_D"], eps)
        q, k = rotate(q, cos_sin_TD), rotate(k, cos_sin_TD)
        k_LNKD, v_LNKD = k_LNKD.at[i, slots_T].set(k), v_LNKD.at[i, slots_T].set(v)
        out = attend(q, k_LNKD, v_LNKD, i, batch, layer.get("sinks_H"), spec, page_size, one_token)
        x_TE = x_TE + linear(out.reshape(x_TE.shape[0], -1), layer["o"])
        gate, up = jnp.split(linear(rms_norm(x_TE, layer["mlp_norm_E"], eps), layer["gate_up"]), 2, axis=-1)
        x_TE = x_TE + linear(jax.nn.silu(gate) * up, layer["down"])
    last_BE = rms_norm(x_TE[cu_seqlens_q_B1[1:] - 1], weights["final_norm_E"], eps)
    return jnp.argmax(linear(last_BE, weights["head"]), axis=-1).astype(jnp.int32), k_LNKD, v_LNKD


def _xla(q, k, v, layer, batch, sinks, spec, page_size, one_token):  # type: ignore[no-untyped-def]
    pools = (pool.reshape(-1, *pool.shape[2:]) for pool in (k, v))
    sinks = None if sinks is None else sinks.astype(jnp.float32)
    out, _ = with_xla(
        q, *pools, layer * k.shape[1], *batch, sinks,
        mask=spec.mask, page_size=page_size, scale=spec.scale, softcap=spec.softcap, tile=1 if one_token else TILE,
    )  # fmt: skip
    return out


def _backend(q, k, v, layer, batch, sinks, spec, page_size, one_token, *, name, device):  # type: ignore[no-untyped-def]
    pools = (pool.reshape(pool.shape[0], -1, page_size, *pool.shape[2:]) for pool in (k, v))
    table, lens, cu_seqlens_q = batch
    return through_a_backend(
        q, *pools, table, lens, None if one_token else cu_seqlens_q,
        backend=name, device=device, layer=layer, mask=spec.mask, scale=spec.scale, softcap=spec.softcap, sinks_H=sinks,
    )  # fmt: skip


def linear(x: Any, weight: Any) -> Any:
    return jnp.matmul(x, weight.T, precision=HIGHEST)


def rms_norm(x: Any, weight: Any, eps: float) -> Any:
    wide = x.astype(jnp.float32)
    normed = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (normed * weight.astype(jnp.float32)).astype(x.dtype)


def rotate(x_THD: Any, cos_sin_TD: Any) -> Any:
    cos, sin = jnp.split(cos_sin_TD[:, None], 2, axis=-1)
    first, second = jnp.split(x_THD.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(
        x_THD.dtype
    )
