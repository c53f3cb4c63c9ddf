"""Generated text is that of transformers, a step behind the device, and comes in pieces that add up to it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fa_research.config import (
    Config,
    CudaGraphConfig,
    Device,
    Dtype,
    GraphMode,
    KVConfig,
    Level,
    ModelConfig,
    TextWorkload,
)
from fa_research.config.checkpoint import take_from_folder
from fa_research.engine.decode import DecodeRunner
from fa_research.errors import ConfigError
from fa_research.measure.cell import check
from fa_research.workloads.generation import Generation
from fa_research.workloads.text import Text
from tests.models.checkpoints import ORIGINAL, PEERS, edit_config, save, save_tokenizer
from tests.test_runner import run
from tests.workloads.cells import build, cell, text_file

OPTIONS = TextWorkload(
    batch_size=2,
    prompt_len=23,
    shared_prefix_len=5,
    chunk_size=7,
    steps=2,
    generate=40,
    prompt="é is followed",
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(PEERS["qwen2-window"], tmp_path / "model", vocab_size=300)
    edit_config(tmp_path / "model", max_position_embeddings=160)
    return tmp_path / "model"


def cell_of(
    folder: Path,
    tmp_path: Path,
    page_size: int = 16,
    graph: Any = None,
    dtype: Dtype = Dtype.auto,
    **changes: Any,
) -> Config:
    options = dataclasses.replace(OPTIONS, **{"path": str(text_file(tmp_path))} | changes)
    graph = graph or CudaGraphConfig(GraphMode.simulate, [1, 2])
    model = take_from_folder(ModelConfig(path=str(folder), dtype=dtype))
    return cell(options, model=model, kv=KVConfig(page_size), cuda_graph=graph)


def generation_of(config: Config) -> tuple[Generation, Text]:
    workload, engine = build(config)
    assert isinstance(workload, Text)
    return workload.generation(engine), workload


def theirs(prompt: list[int], count: int, **options: Any) -> list[int]:
    ids = torch.tensor([prompt])
    model = PEERS["qwen2-window"].make(vocab_size=300)
    options |= {"attention_mask": torch.ones_like(ids), "max_new_tokens": count, "do_sample": False}
    generated: list[int] = model.generate(ids, **options)[0, len(prompt) :].tolist()  # type: ignore[operator]
    return generated


@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("mode", [GraphMode.off, GraphMode.simulate])
@pytest.mark.parametrize("tokenizer", [False, True])
def test_it_is_what_transformers_generates(
    page_size: int, mode: GraphMode, tokenizer: bool, folder: Path, tmp_path: Path
) -> None:
    """Greedy, past the window, from a prompt in three chunks; everything is given back to the cache."""
    prompt = list("é is followed".encode())
    if tokenizer:
        prompt = save_tokenizer(folder).encode("é is followed").ids
        assert prompt[0] == 0
    generation, workload = generation_of(cell_of(folder, tmp_path, page_size, CudaGraphConfig(mode, [1, 2])))
    tokens = list(generation.tokens())
    assert tokens == theirs(prompt, 40) and len(set(tokens)) > 5
    cache = generation.engine.cache
    assert cache.allocator.pages_used == 0 and not cache.requests
    assert list(generation.tokens()) == tokens
    workload.prepare(generation.engine)
    workload.checked_passes()  # what was generated leaves nothing behind


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_tokens(count: int, folder: Path, tmp_path: Path) -> None:
    generation, _ = generation_of(cell_of(folder, tmp_path, generate=count))
    assert list(generation.tokens()) == theirs(generation.prompt, count)


@pytest.mark.parametrize("name", ["phi3-long", "llama-dynamic"])
def test_past_the_original_length_it_is_what_transformers_computes(name: str, tmp_path: Path) -> None:
    """The measured prompts stay below the original length and the written text passes it: the rotation of the run is
    that of the longest sequence, the written one. Transformers has it for the whole text in one pass (its `generate`
    keeps keys that dynamic NTK rotated for a shorter text)."""
    model = save(PEERS[name], tmp_path / "model", vocab_size=300)
    config = cell_of(tmp_path / "model", tmp_path, prompt_len=8, shared_prefix_len=0)
    generation, workload = generation_of(config)
    prompt, tokens = generation.prompt, list(generation.tokens())
    assert workload.options.prompt_len + workload.most_steps <= ORIGINAL
    assert len(prompt) < ORIGINAL < len(prompt) + len(tokens) - 1 and len(set(tokens)) > 5
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *tokens[:-1]]])).logits[0, len(prompt) - 1 :]
    assert tokens == logits.argmax(-1).tolist()


def test_a_prompt_past_the_original_length_is_continued_as_transformers_does(tmp_path: Path) -> None:
    """LongRoPE: the long factors from the first token on, on both sides."""
    model: Any = save(PEERS["phi3-long"], tmp_path / "model", vocab_size=300)
    text = "what follows is followed by this"
    config = cell_of(tmp_path / "model", tmp_path, prompt=text, prompt_len=8, shared_prefix_len=0)
    ids = torch.tensor([list(text.encode())])
    assert ids.shape[1] > ORIGINAL
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 40, "do_sample": False}
    expected = model.generate(ids, **options)[0, ids.shape[1] :].tolist()
    assert list(generation_of(config)[0].tokens()) == expected


def test_the_texts_beginning_is_the_default(folder: Path, tmp_path: Path) -> None:
    generation, workload = generation_of(cell_of(folder, tmp_path, prompt=None))
    assert generation.prompt == workload.prompts[0] and len(generation.prompt) == 23
    assert next(generation.text()) == text_file(tmp_path).read_text()[:23]


def test_a_text_ends_where_the_model_ends_it(folder: Path, tmp_path: Path) -> None:
    whole = list(generation_of(cell_of(folder, tmp_path))[0].tokens())
    end = next(token for i, token in enumerate(whole) if i > 6 and token not in whole[:i])
    edit_config(folder, eos_token_id=end)
    generation, _ = generation_of(cell_of(folder, tmp_path))
    written = list(generation.tokens())
    assert [*written, end] == theirs(generation.prompt, 40, eos_token_id=end) and len(written) < 40
    assert generation.engine.cache.allocator.pages_used == 0


@pytest.mark.parametrize("ahead", [False, True])
def test_pieces_come_as_early_as_they_can(
    ahead: bool, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first token's before any step; a later one's on a GPU when the step after it was launched, which then runs
    beside the host, and on the CPU, where nothing does, right after its own."""
    generation, _ = generation_of(cell_of(folder, tmp_path, generate=12))
    generation.ahead = ahead
    launched, step = [0], DecodeRunner.step

    def counted(self: DecodeRunner) -> None:
        launched[0] += 1
        step(self)

    monkeypatch.setattr(DecodeRunner, "step", counted)
    pieces: Iterator[str] = generation.text()
    shown, seen = [next(pieces)], []
    assert shown == ["é is followed"] and launched == [0]
    for piece in pieces:
        shown.append(piece)
        seen.append(launched[0])
    # of the last token, and of what is left, no step follows
    assert seen == ([0, *range(2, 12), 11, 11] if ahead else [*range(12), 11])
    tokens = bytes(min(token, 255) for token in [*generation.prompt, *theirs(generation.prompt, 12)])
    assert "".join(shown) == tokens.decode(errors="replace")


def test_prompts_that_will_not_do(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="workload.prompt is empty; give some text, or null"):
        Text(cell_of(folder, tmp_path, prompt="")).needs()
    long = cell_of(folder, tmp_path, prompt="x" * 121)
    with pytest.raises(
        ConfigError,
        match="workload.prompt of 121 tokens .* = 161 tokens: must be at most model.max_context_len=160",
    ):
        Text(long).needs()
    assert max(Text(cell_of(folder, tmp_path, prompt="x" * 120)).needs().seq_lens) == 159
    list(generation_of(cell_of(folder, tmp_path, prompt="x" * 120))[0].tokens())


@pytest.mark.parametrize(("changes", "message"), [
    ({"generate": -1}, "workload.generate=-1: must be at least 0"),
    ({"prompt": None, "generate": 140}, "workload.prompt_len=23 [+] workload.generate=140 = 163 tokens"),
])  # fmt: skip
def test_keys_that_contradict_each_other(
    changes: dict[str, Any], message: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        cell_of(folder, tmp_path, **changes)


def test_the_attention_path_alone_writes_nothing_and_says_so(tmp_path: Path) -> None:
    options = dataclasses.replace(OPTIONS, path=str(text_file(tmp_path)))
    row = run(cell(options, Level.attention), tmp_path)
    assert not row.generated
    assert "workload.generate=40: the attention path alone writes no text" in row.notes


def test_bytes_of_a_prompt_that_are_no_text(folder: Path, tmp_path: Path) -> None:
    """A command line may hold any bytes."""
    generation, _ = generation_of(cell_of(folder, tmp_path, prompt=b"a\xff".decode(errors="surrogateescape")))
    assert generation.prompt == [97, 255] and next(generation.text()) == "a\ufffd"
    json.dumps("".join(generation.text())).encode()


@pytest.mark.gpu
@pytest.mark.parametrize("mode", [GraphMode.off, GraphMode.on])
def test_on_a_gpu_it_is_what_transformers_generates(mode: GraphMode, folder: Path, tmp_path: Path) -> None:
    """In float32, with and without graphs; the steps of the workload that follows are captured anew and right."""
    config = cell_of(folder, tmp_path, graph=CudaGraphConfig(mode, [1, 2]), dtype=Dtype.float32)
    config.device, config.backend.name = Device.cuda, "triton"
    generation, workload = generation_of(config)
    tokens = list(generation.tokens())
    assert tokens == theirs(generation.prompt, 40) and list(generation.tokens()) == tokens
    workload.prepare(generation.engine)
    assert check(generation.engine, workload)[0]
