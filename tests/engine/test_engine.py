"""What the engine chooses where the config leaves it open, and what it says where the config cannot work."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fa_research.attention.layer import PagedAttention
from fa_research.batch import ForwardMode
from fa_research.config import (
    BackendConfig,
    CudaGraphConfig,
    Device,
    Dtype,
    GraphMode,
    KVConfig,
    Level,
    RopeScaling,
    RopeType,
)
from fa_research.engine.attention_stack import AttentionStack
from fa_research.engine.cuda_graph import resolve_graph_mode
from fa_research.engine.engine import build_engine, resolve_device, resolve_dtype, rope_notes
from fa_research.errors import BackendUnavailable, ConfigError
from fa_research.models import attention_specs
from fa_research.spec import Capabilities, GraphSupport
from tests.engine.built import CPU, MODEL, NEEDS, config_of, engine_of

CUDA = torch.device("cuda")


def resolved(mode: GraphMode, device: torch.device, support: GraphSupport) -> GraphMode:
    can = Capabilities(frozenset(), frozenset(), frozenset(), cuda_graph=support)
    return resolve_graph_mode(CudaGraphConfig(mode), device, can, "some")


def test_graph_mode() -> None:
    decode, never = GraphSupport.DECODE, GraphSupport.NEVER
    assert resolved(GraphMode.auto, CPU, decode) is GraphMode.simulate
    assert resolved(GraphMode.auto, CPU, never) is GraphMode.simulate
    assert resolved(GraphMode.auto, CUDA, decode) is GraphMode.on
    assert resolved(GraphMode.auto, CUDA, never) is GraphMode.off
    assert resolved(GraphMode.on, CUDA, decode) is GraphMode.on
    for device in (CPU, CUDA):
        for mode in (GraphMode.off, GraphMode.simulate):
            assert resolved(mode, device, never) is mode
    with pytest.raises(
        ConfigError, match=r"cuda_graph.mode=on needs a CUDA device.*cpu.*cuda_graph.mode=simulate or off"
    ):
        resolved(GraphMode.on, CPU, decode)
    with pytest.raises(ConfigError, match="backend=some cannot be captured; use cuda_graph.mode=off"):
        resolved(GraphMode.on, CUDA, never)


def test_graph_mode_is_refused_before_memory_is_taken() -> None:
    config = config_of(cuda_graph=CudaGraphConfig(GraphMode.on), kv=KVConfig(num_pages=10**12))
    with pytest.raises(ConfigError, match="cuda_graph.mode=on"):
        engine_of(config)


@pytest.mark.parametrize(
    ("batch_size", "sizes", "captured"),
    [
        (1, [1, 2, 4], [1]),
        (3, [4, 1, 2], [1, 2, 4]),
        (4, [1, 2, 4, 8], [1, 2, 4]),
        (5, [1, 2, 4], []),
        (2, [8], [8]),
    ],
)
def test_the_sizes_that_a_batch_needs_are_captured(
    batch_size: int, sizes: list[int], captured: list[int]
) -> None:
    engine = engine_of(config_of(cuda_graph=CudaGraphConfig(GraphMode.simulate, sizes)))
    decoder = engine.decoder(batch_size, 33)
    assert decoder.batch_sizes == captured
    assert decoder.mode is (GraphMode.simulate if captured else GraphMode.off)


def test_a_batch_above_the_largest_size_runs_eagerly_and_is_noted() -> None:
    engine = engine_of(config_of(cuda_graph=CudaGraphConfig(GraphMode.simulate, [1, 2])))
    requests = [engine.cache.open() for _ in range(3)]
    assert engine.runner.extend(requests, [[1], [2], [3]]) is not None
    decoder = engine.decoder(3, 33)
    decoder.start(requests, [4, 5, 6])
    decoder.step()
    assert decoder.ran_eagerly and decoder.padded_size == 3
    (note,) = [note for note in engine.notes if "eagerly" in note]
    assert note == "ran eagerly: batch size 3 is above the largest of cuda_graph.batch_sizes (2)"
    small = engine.decoder(2, 33)
    small.start(requests[:2], [4, 5])
    assert not small.ran_eagerly and small.padded_size == 2
    assert sum("eagerly" in note for note in engine.notes) == 1


def test_eager_by_request_is_not_noted() -> None:
    for sizes in ([1, 2], []):
        engine = engine_of(config_of(cuda_graph=CudaGraphConfig(GraphMode.off, sizes)))
        assert engine.decoder(3, 33).mode is GraphMode.off
        assert not any("eagerly" in note for note in engine.notes)


def test_device_and_dtype() -> None:
    assert resolve_device(config_of(device=Device.cpu)) == CPU
    assert resolve_dtype(Dtype.auto, CPU) is torch.float32
    assert resolve_dtype(Dtype.auto, CUDA) is torch.bfloat16
    assert resolve_dtype(Dtype.float16, CPU) is torch.float16


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_gpu_is_refused() -> None:
    with pytest.raises(ConfigError, match="device=cuda: torch sees no CUDA device here; use device=cpu"):
        resolve_device(config_of(device=Device.cuda))
    assert resolve_device(config_of(device=Device.auto)) == CPU


@pytest.mark.gpu
def test_the_gpu_is_the_automatic_choice() -> None:
    assert resolve_device(config_of(device=Device.auto)).type == "cuda"
    assert resolve_device(config_of(device=Device.cpu)) == CPU


def test_the_automatic_backend_is_noted_with_its_reason() -> None:
    engine = engine_of(config_of(backend=BackendConfig("auto")))
    assert engine.backend.name == "torch"
    assert engine.notes == ["backend=auto chose torch: on this device the others are for tests only"]
    assert engine_of(config_of(backend=BackendConfig("torch"))).notes == []


def test_what_a_backend_chose_is_noted() -> None:
    pytest.importorskip("jax")
    (note,) = engine_of(config_of(backend=BackendConfig("jax"))).notes
    assert (
        note
        == "backend=jax: one token a request by xla, other passes by xla (pallas is interpreted off the GPU)"
    )


def test_a_backend_that_cannot_run_here_names_those_that_can() -> None:
    with pytest.raises(BackendUnavailable, match="no CUDA device.*would work here: .*torch, triton"):
        engine_of(config_of(backend=BackendConfig("fa3")))


def stack_of(num_layers: int = 2, **changes: Any) -> tuple[AttentionStack, Any]:
    specs = attention_specs(dataclasses.replace(MODEL, num_layers=num_layers, **changes))
    stack = AttentionStack(specs, max_tokens=6, dtype=torch.float32, device=CPU, seed=3)
    return stack, specs


def test_attention_stack_attends_with_its_own_data() -> None:
    stack, specs = stack_of(sink=True)
    calls = []

    class Recorder(PagedAttention):
        mode = ForwardMode.DECODE

        def __init__(self) -> None:
            pass

        def __call__(self, layer_id: int, q, k, v, *, rope, sinks_H):  # type: ignore[no-untyped-def, override]
            calls.append((layer_id, q.shape, k.shape, v.shape, rope, sinks_H is stack.sinks_H))
            return q + layer_id

    attend = Recorder()
    hidden = stack(torch.zeros(4, dtype=torch.int64), attend)
    shapes = (torch.Size([4, 2, 64]), torch.Size([4, 1, 64]), torch.Size([4, 1, 64]))
    assert calls == [(0, *shapes, None, True), (1, *shapes, None, True)]
    assert torch.equal(hidden, (stack.q_THD[:4] + 1).flatten(1))
    assert stack.compute_logits(hidden) is None
    stack(torch.zeros(2, dtype=torch.int64), attend)
    assert {key: [t.shape[0] for t in outputs] for key, outputs in stack.outputs.items()} == {
        (ForwardMode.DECODE, 4): [4, 4],
        (ForwardMode.DECODE, 2): [2, 2],
    }
    again, _ = stack_of()
    assert torch.equal(again.q_THD, stack.q_THD) and again.sinks_H is None
    assert abs(float(stack.q_THD.std()) - 1) < 0.1


def test_an_engine_of_the_attention_path_alone() -> None:
    config = config_of(kv=KVConfig(4))
    specs = attention_specs(config.model)
    make: Callable[..., AttentionStack] = lambda device, dtype: AttentionStack(  # noqa: E731
        specs, max_tokens=54, dtype=dtype, device=device, seed=0
    )
    engine = build_engine(config, NEEDS, specs, CPU, make)
    assert engine.stack is engine.runner.model
    request = engine.cache.open()
    assert engine.runner.extend([request], [[0] * 5]) is None
    assert engine.runner.extend_in_chunks([request], [[0] * 5], 2) is None
    decoder = engine.decoder(1, 33)
    decoder.start([request], [0])
    for _ in range(3):
        decoder.step()
    assert decoder.logits_BX is None and len(decoder.reader) == 0
    decoder.flush()
    assert request.seq_len == 13
    assert engine_of(config).stack is None


@pytest.mark.parametrize(
    ("kind", "original", "note"),
    [
        (RopeType.longrope, 32, "LongRoPE: long factors"),
        (RopeType.longrope, 33, "LongRoPE: short factors"),
        (
            RopeType.dynamic,
            32,
            "dynamic NTK RoPE: the base for 33 tokens",
        ),
        (
            RopeType.dynamic,
            64,
            "dynamic NTK RoPE: the base for 64 tokens",
        ),
        (RopeType.yarn, 32, None),
    ],
)
def test_a_rotation_chosen_by_length_is_noted(kind: RopeType, original: int, note: str | None) -> None:
    model = dataclasses.replace(MODEL, rope_scaling=RopeScaling(kind, original_max_position=original))
    config = config_of(model=model)
    reach = (
        f"for every sequence of this run; the longest, written text included, reaches 33 of {original} tokens"
    )
    assert rope_notes(config, NEEDS) == ([] if note is None else [f"{note} {reach}"])
    config.workload.level = Level.attention  # nothing is rotated there
    assert rope_notes(config, NEEDS) == []
