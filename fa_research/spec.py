"""What a layer asks of an attention backend, and what a backend says it can do. Plain data, no torch.

`AttentionSpec` is one layer's attention as a value (the idea of attention-gym and FlexAttention: variants are
data). `Capabilities` is one backend's answer; `fa_research.attention.lowering` brings the two together."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from fa_research.masks import Causal, Mask


class KVLayout(Enum):
    """How keys and values lie in the cache. MHA covers grouped-query and multi-query attention too."""

    MHA = "mha"


class GraphSupport(Enum):
    """When a backend's kernels may be captured in a CUDA graph."""

    NEVER = "never"
    DECODE = "decode"


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """One layer's attention: head counts, head dims (elements), softmax scale, score softcap (0 = none),
    mask, KV layout, and whether each query head has a learned sink logit (gpt-oss)."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    scale: float
    softcap: float = 0.0
    mask: Mask = field(default_factory=Causal)
    layout: KVLayout = KVLayout.MHA
    has_sink: bool = False

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} must be a multiple of "
                f"num_kv_heads={self.num_kv_heads} (grouped-query attention)"
            )


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a backend computes natively on the device at hand. `None` in a set's place means "any".

    mask_features: which parts of a mask's `Band` the kernel evaluates: "causal", "full", "window", "chunk";
        "predicate" means it evaluates any `Mask.allows`.
    own_v_head_dim: values may have another head dim than keys.
    own_kv_dtype: keys and values may be cached in another dtype than that of the queries.
    page_size_multiple: page sizes must be a multiple of this.
    devices: torch device types. dtypes: torch dtype names, as in "bfloat16".
    host_planning: the backend must run `plan` on the host before every pass (and before every graph replay).
    """

    devices: frozenset[str]
    dtypes: frozenset[str]
    mask_features: frozenset[str]
    head_dims: frozenset[int] | None = None
    own_v_head_dim: bool = False
    own_kv_dtype: bool = False
    layouts: frozenset[KVLayout] = frozenset({KVLayout.MHA})
    page_size_multiple: int = 1
    softcap: bool = False
    sinks: bool = False
    returns_lse: bool = False
    host_planning: bool = False
    cuda_graph: GraphSupport = GraphSupport.DECODE
