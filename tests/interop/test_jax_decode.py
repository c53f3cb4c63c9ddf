"""experiments/jax_decode: the decoder in JAX on a torch model's weights makes torch's tokens, in float32."""

from __future__ import annotations

import pytest
import torch

jax = pytest.importorskip("jax")

from experiments.jax_decode.decoder import JaxDecoder, share_model  # noqa: E402
from fa_research import backends  # noqa: E402
from fa_research.backends import BackendSettings  # noqa: E402
from fa_research.config import LocalConfig, MaskConfig, ModelConfig  # noqa: E402
from fa_research.engine.model_runner import ModelRunner  # noqa: E402
from fa_research.models import Decoder  # noqa: E402
from tests.helpers import make_cache  # noqa: E402

PROMPTS = [[5, 9, 1], [7] * 17, list(range(40)), [3]]
STEPS = 12
VARIANTS = {
    "llama": {},
    "qwen": {"qkv_bias": True, "qk_norm": True, "tie_word_embeddings": True},
    "windowed": {"mask": MaskConfig("sliding_window", 9), "softcap": 20.0, "sink": True},
    "alternating": {"local": LocalConfig([True, False], MaskConfig("chunked", 16)), "attention_scale": 0.2},
}


def make_model(**changes: object) -> Decoder:
    config = ModelConfig(hidden_size=64, intermediate_size=96, vocab_size=101, max_context_len=160, **changes)
    model = Decoder(config, dtype=torch.float32, device="cpu")
    model.init_random_(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "_norm_" not in name:
                weight.mul_(8.0)  # attention that matters, and logits that are far apart
    return model


def torchs_tokens(model: Decoder) -> list[list[int]]:
    """Greedy tokens by extend passes of the package, one at a time."""
    settings = BackendSettings(torch.device("cpu"), torch.float32, 16, 160)
    backend = backends.create("torch", settings, model.attention_specs)
    config = model.config
    cache = make_cache(
        64, 16, max_requests=4, max_context_len=160, num_layers=config.num_layers,
        kv_heads=config.num_kv_heads, head_dim=config.head_dim, dtype=torch.float32,
    )  # fmt: skip
    runner = ModelRunner(model, backend, cache)
    requests = [cache.open() for _ in PROMPTS]
    new, tokens = [list(prompt) for prompt in PROMPTS], []
    for _ in range(STEPS):
        logits = runner.extend(requests, new)
        assert logits is not None
        tokens.append(logits.argmax(-1).tolist())
        new = [[token] for token in tokens[-1]]
    return [list(row) for row in zip(*tokens, strict=True)]


@pytest.mark.parametrize("attention", ["xla", "torch"])
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_tokens_are_torchs(variant: str, attention: str) -> None:
    model = make_model(**VARIANTS[variant])
    decoder = JaxDecoder(model, attention=attention)
    expected = torchs_tokens(model)
    assert decoder.generate(PROMPTS, STEPS).tolist() == expected
    assert len({token for row in expected for token in row}) > 10, "a model that repeats itself tests nothing"
    assert decoder.generate(PROMPTS, STEPS).tolist() == expected, "pages that were used before"


def test_every_weight_is_read_where_torch_has_it() -> None:
    model = make_model(qkv_bias=True)
    pointers = {array.unsafe_buffer_pointer() for array in jax.tree.leaves(share_model(model))}
    assert pointers == {p.data_ptr() for p in model.parameters()} | {model.cos_sin_XD.data_ptr()}


def test_what_torch_writes_to_a_weight_changes_the_next_tokens() -> None:
    """Weights are arguments of the jitted step and not constants of it."""
    model = make_model()
    decoder = JaxDecoder(model)
    before = decoder.generate(PROMPTS, STEPS).tolist()
    with torch.no_grad():
        model.head.copy_(model.head.flip(0))
    after = decoder.generate(PROMPTS, STEPS).tolist()
    assert after == torchs_tokens(model) != before


def test_another_architecture_is_refused() -> None:
    model = make_model()
    model.layers[0].register_parameter("router", torch.nn.Parameter(torch.zeros(64)))
    with pytest.raises(ValueError, match=r"Llama family, not layers\.0\.router"):
        JaxDecoder(model)


def test_what_it_does_not_compute_is_refused() -> None:
    with pytest.raises(ValueError, match=r"without model\.embedding_scale, model\.logit_softcap"):
        JaxDecoder(make_model(embedding_scale=8.0, logit_softcap=30.0))


def test_what_there_is_no_room_for_is_refused() -> None:
    with pytest.raises(ValueError, match="make 180 tokens, model.max_context_len=160"):
        JaxDecoder(make_model()).generate([[1] * 150], 30)
    with pytest.raises(ValueError, match="4 pages of 16 tokens are needed, num_pages leaves 3"):
        JaxDecoder(make_model(), num_pages=3).generate([[1] * 40], 20)
