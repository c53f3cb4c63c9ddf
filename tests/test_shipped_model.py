"""The model that comes with the package: transformers computes the same from it; it knows text that it never saw."""

from __future__ import annotations

import math
import sysconfig
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fa_research.config import CudaGraphConfig, GraphMode, KVConfig, ModelConfig, TextWorkload
from fa_research.config.checkpoint import checkpoint_folder, take_from_folder
from fa_research.measure.quality import measure_quality
from fa_research.models import Decoder, build_model
from fa_research.workloads.heldout import is_held_out, is_in_corpus
from fa_research.workloads.text import Text
from tests.engine.lab import PADDED, Lab, decode
from tests.workloads.cells import cell, prepared

transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")
safetensors = pytest.importorskip("safetensors")

PATH = "pkg://fa_research/checkpoints/pybyte"
LIBRARY = Path(sysconfig.get_path("stdlib"))
HELD_OUT = "email/header.py"  # in every version of Python
WINDOW = 512
ATOL = 1e-3  # of float32 logits whose standard deviation is above 3


@pytest.fixture(scope="module")
def theirs() -> torch.nn.Module:
    folder = checkpoint_folder(PATH)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def ours() -> Decoder:
    config = take_from_folder(ModelConfig(path=PATH))
    return build_model(config, dtype=torch.float32, device="cpu", seed=0, rope_len=1024)


@torch.no_grad()
def logits_of(model: torch.nn.Module, tokens: list[int]) -> Tensor:
    return model(torch.tensor([tokens])).logits[0]  # type: ignore[no-any-return]


def test_the_files() -> None:
    folder = checkpoint_folder(PATH)
    assert {file.name for file in folder.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    weights = folder / "model.safetensors"
    assert weights.stat().st_size < 15e6
    with safetensors.safe_open(weights, framework="pt") as file:
        names = file.keys()
        assert {file.get_slice(name).get_dtype() for name in names} == {"BF16"}


def test_what_it_was_not_trained_on() -> None:
    """The rule that made the data. Were it changed, text that the model knows would be called held out."""
    held_out = ("email/header.py", "http/cookies.py", "importlib/resources/readers.py", "urllib/error.py",
                "test/test_json/__init__.py", "unittest/test/testmock/testpatch.py", "test/test_fcntl.py")  # fmt: skip
    assert all(map(is_held_out, held_out))
    trained_on = ("argparse.py", "asyncio/base_events.py", "test/test_argparse.py", "typing.py", "zipfile.py")
    assert all(map(is_in_corpus, trained_on)) and not any(map(is_held_out, trained_on))
    assert not is_in_corpus("encodings/cp037.py") and not is_in_corpus("site-packages/email/header.py")


def test_prefill_past_the_window_and_decoding_are_those_of_transformers(
    ours: Decoder, theirs: torch.nn.Module
) -> None:
    """Prompts that end before, at and past the window; real text, which attention is sharp on."""
    text = (LIBRARY / HELD_OUT).read_bytes()
    prompts = [list(text[:700]), list(text[1000 : 1000 + WINDOW - 3]), list(text[3000:3020])]
    lab = Lab(PADDED, page_size=16, loaded=ours, max_context_len=1024)
    long = lab.again(prompts[0])
    expected = logits_of(theirs, prompts[0])
    assert expected.std() > 3
    torch.testing.assert_close(long, expected, rtol=1e-4, atol=ATOL)
    requests, first = lab.prefill(prompts)
    result = decode(lab.decoder(4), requests, prompts, first, steps=8)
    for sequence, logits in zip(result.sequences, result.logits, strict=True):
        expected = logits_of(theirs, sequence[:-1])[-len(logits) :]
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=ATOL)
        assert sequence[-len(logits) :] == expected.argmax(-1).tolist()


def test_the_window_matters(ours: Decoder, theirs: torch.nn.Module) -> None:
    """With all keys visible the logits past the window are others: the test above would see it."""
    text = list((LIBRARY / HELD_OUT).read_bytes()[:700])
    config = take_from_folder(ModelConfig(path=PATH))
    assert config.local.mask.size == WINDOW
    config.local.mask.size = WINDOW + 100
    wide = Decoder(config, dtype=torch.float32, device="cpu", rope_len=1024)
    wide.load_state_dict(ours.state_dict(), strict=False)
    difference = Lab(PADDED, loaded=wide, max_context_len=1024).again(text) - logits_of(theirs, text)
    assert difference[:WINDOW].abs().max() < ATOL < 10 * ATOL < difference[WINDOW:].abs().max()


def test_bits_per_byte_of_text_that_it_never_saw(theirs: torch.nn.Module) -> None:
    """Through the engine, by prefill and by decode steps, as transformers has it; far below what such text takes
    without a model of it (LZMA: 1.4 for the whole of the held-out files)."""
    assert is_held_out(HELD_OUT)
    options = TextWorkload(
        path=str(LIBRARY / HELD_OUT), batch_size=1, prompt_len=1000, shared_prefix_len=0, chunk_size=320, steps=40
    )  # fmt: skip
    model = take_from_folder(ModelConfig(path=PATH))
    workload, engine = prepared(
        cell(options, model=model, kv=KVConfig(16), cuda_graph=CudaGraphConfig(GraphMode.simulate, [1]))
    )
    assert isinstance(workload, Text)
    columns = measure_quality(engine, workload)
    (passage,) = workload.passages
    tokens = torch.tensor(passage.tokens)
    bits = F.cross_entropy(logits_of(theirs, passage.tokens)[:-1], tokens[1:], reduction="none") / math.log(2)
    assert columns["scored_tokens"] == 1000 and columns["decode_scored_tokens"] == 40
    assert columns["bits_per_byte"] == pytest.approx(float(bits[:1000].double().mean()), rel=1e-4)
    assert columns["decode_bits_per_byte"] == pytest.approx(float(bits[1000:].double().mean()), rel=1e-4)
    assert columns["bits_per_byte"] < 1.35
    assert columns["top1_agreement"] == 1.0


def test_greedy_text_looks_like_python(ours: Decoder) -> None:
    """Of a class's head it makes methods, indented by fours."""
    prompt = list(b"import os\nimport sys\n\nclass Parser:\n")
    lab = Lab(PADDED, loaded=ours, max_context_len=1024)
    requests, first = lab.prefill([prompt])
    (sequence,) = decode(lab.decoder(1), requests, [prompt], first, steps=150).sequences
    lines = bytes(sequence[len(prompt) :]).decode("ascii").splitlines()
    assert any(line.startswith("    def ") and line.rstrip().endswith(":") for line in lines)
    assert all((len(line) - len(line.lstrip())) % 4 == 0 for line in lines)
