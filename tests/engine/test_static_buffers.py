"""Known failure 1: a replay reads the tensors that were there at the capture, whatever the engine did since."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from fa_research.attention.call import AttentionCall, AttentionOutput
from fa_research.backends import BackendSettings
from fa_research.backends.torch_backend import TorchBackend
from fa_research.config import GraphMode
from fa_research.engine.decode import DecodeRunner
from fa_research.engine.decode_state import DecodeState
from fa_research.masks import Causal, Chunked, Mask
from fa_research.metadata import FlashAttentionMetadata
from fa_research.spec import AttentionSpec
from tests.engine.lab import GPU, PADDED, Lab, Place, decode, places, prompts_of


def metadata_tensors(metadata: FlashAttentionMetadata | None) -> dict[str, Tensor]:
    assert metadata is not None
    slots = FlashAttentionMetadata.__dataclass_fields__
    return {n: getattr(metadata, n) for n in slots if isinstance(getattr(metadata, n), Tensor)}


def addresses(lab: Lab, decoder: DecodeRunner) -> dict[str, int]:
    """Where everything lies that a captured step reads or writes, bar what the graph allocates itself."""
    named = {f"state.{name}": tensor for name, tensor in decoder._static.tensors().items()}
    assert decoder.graph_state is not None
    named |= {f"metadata.{name}": t for name, t in metadata_tensors(decoder.graph_state.metadata).items()}
    named |= {f"weight.{name}": p for name, p in lab.model.named_parameters()}
    named |= {f"weight.{name}": p for name, p in lab.model.named_buffers()}
    named |= {"table": lab.runner.req_to_token_RW, "k": lab.cache.kv.k_LNKD, "v": lab.cache.kv.v_LNKV}
    return {name: tensor.data_ptr() for name, tensor in named.items()}


@pytest.mark.parametrize("place", places(PADDED, *GPU))
def test_known_failure_1_everything_a_replay_reads_stays_where_it_was(place: Place) -> None:
    lab = Lab(place)
    decoder = lab.decoder(1, 2, 4)
    captured = addresses(lab, decoder)
    assert len(captured) > 20 and set(vars(decoder._static)) > {"input_ids_B", "seq_lens_B"}
    prompts = prompts_of(21, 4, 33, 8, 5)
    requests, first = lab.prefill(prompts)
    other = lab.cache.open()
    for which in ((0, 1, 2), (0,), (1, 2, 3, 4, 0), (3, 4)):  # the third is larger than any captured size
        sequences = [prompts[i] + [0] * (requests[i].seq_len - len(prompts[i])) for i in which]
        decode(
            decoder, [requests[i] for i in which], sequences, first[list(which)], 7,
            lambda step, other=other: lab.runner.extend([other], [[step + 1]]),
        )  # fmt: skip
        assert addresses(lab, decoder) == captured
        lab.cache.close(other)
        other = lab.cache.open()
        assert addresses(lab, decoder) == captured


class Witness(TorchBackend):
    """The torch backend, which writes down where the metadata of every decode step lies."""

    name = "witness"

    def __init__(self, settings: BackendSettings, specs: Sequence[AttentionSpec]) -> None:
        super().__init__(settings, specs)
        self.seen: list[tuple[int, dict[str, int]]] = []

    def attend(self, call: AttentionCall) -> AttentionOutput:
        if call.metadata.q_len == 1:
            pointers = {name: tensor.data_ptr() for name, tensor in metadata_tensors(call.metadata).items()}
            self.seen.append((call.metadata.batch_size, pointers))
        return super().attend(call)


def test_known_failure_1_every_batch_size_attends_with_the_static_metadata() -> None:
    lab = Lab(PADDED, make_backend=Witness)
    prompts = prompts_of(21, 4, 33)
    requests, first = lab.prefill(prompts)
    decoder = lab.decoder(1, 2, 4)
    assert isinstance(lab.backend, Witness) and decoder.graph_state is not None
    static = {n: t.data_ptr() for n, t in metadata_tensors(decoder.graph_state.metadata).items()}
    decode(decoder, requests, prompts, first, 3)
    decode(decoder, requests[1:2], prompts[1:2], first[1:2], 3)
    assert [size for size, _ in lab.backend.seen] == [4] * 6 + [1] * 6  # two layers, three steps
    assert all(pointers == static for _, pointers in lab.backend.seen)


def test_every_tensor_of_the_state_is_reported() -> None:
    state = DecodeState(4, torch.device("cpu"))
    assert set(state.tensors()) == {n for n, v in vars(state).items() if isinstance(v, Tensor)}
    assert len(state.tensors()) == 10


def test_loading_leaves_padding_behind_the_batch() -> None:
    state = DecodeState(4, torch.device("cpu"))
    state.load([3, 1, 2], [9, 8, 7], [30, 10, 20])
    state.load([2, 1], [5, 6], torch.tensor([11, 12]))
    assert state.req_pool_indices_B.tolist() == [2, 1, 0, 0]
    assert state.seq_lens_B.tolist() == [5, 6, 1, 1]
    assert state.input_ids_B.tolist() == [11, 12, 0, 0]


@pytest.mark.parametrize("mode", [GraphMode.off, GraphMode.simulate])
def test_lengths_on_device_and_host_agree(mode: GraphMode) -> None:
    lab = Lab(PADDED)
    prompts = prompts_of(21, 4, 33)
    requests, first = lab.prefill(prompts)
    decoder = lab.decoder(4, mode=mode)
    decode(decoder, requests, prompts, first, 9)
    assert decoder.state.seq_lens_B[:3].tolist() == [r.seq_len for r in requests] == [30, 13, 42]
    assert decoder.state.positions_B[:3].tolist() == [29, 12, 41]
    decoder.step()
    others, first = lab.prefill(prompts_of(7))
    decoder.start(others, first.argmax(-1))  # brings the host's lengths of the batch before up to date
    assert [r.seq_len for r in requests] == [31, 14, 43]


@pytest.mark.parametrize("mask", [Causal(), Chunked(16)], ids=["causal", "chunked"])
@pytest.mark.parametrize("place", places(PADDED, *GPU))
def test_two_runners_of_one_backend_take_turns(place: Place, mask: Mask) -> None:
    """Each owns what its captured steps read: one is wide and long, the other made later, narrow and short."""
    lab = Lab(place, mask=mask)
    wide, narrow = lab.decoder(1, 4), lab.decoder(2, bound=48)
    prompts = prompts_of(21, 4, 70, 33, 5)
    requests, first = lab.prefill(prompts)
    split = {wide: (0, 1, 2), narrow: (3, 4)}
    for decoder, which in split.items():
        decoder.start([requests[i] for i in which], first[list(which)].argmax(-1))
    tokens = {i: [int(token)] for i, token in enumerate(first.argmax(-1))}
    logits: dict[int, list[Tensor]] = {i: [] for i in range(5)}
    for _ in range(10):
        for decoder in split:  # the tokens of both are read after both have stepped
            decoder.step()
        for decoder, which in split.items():
            assert decoder.logits_BX is not None
            new = decoder.reader.pop()
            for n, i in enumerate(which):
                logits[i].append(decoder.logits_BX[n].clone())
                tokens[i].append(new[n])
    for i, prompt in enumerate(prompts):
        lab.check([*prompt, *tokens[i][:-1]], torch.stack(logits[i]), f"request {i}")
