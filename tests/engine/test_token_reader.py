"""Sampled tokens reach the host one step behind the device, in order, each step by itself."""

from __future__ import annotations

import pytest
import torch

from fa_research.engine.token_reader import TokenReader
from tests.engine.lab import EAGER, GPU, PADDED, Lab, Place, places, prompts_of
from tests.helpers import DEVICES


def push(reader: TokenReader, tokens: list[int], buffer: torch.Tensor) -> None:
    """As a step does it: the next tokens overwrite the ones before in one static buffer."""
    buffer[: len(tokens)].copy_(torch.tensor(tokens))
    reader.push(buffer[: len(tokens)])


@pytest.mark.parametrize("device", DEVICES)
def test_steps_come_in_order_one_behind(device: str) -> None:
    reader = TokenReader(3, torch.device(device))
    buffer = torch.zeros(3, dtype=torch.int64, device=device)
    push(reader, [10, 11, 12], buffer)
    for step in range(2, 20):
        push(reader, [step * 10, step * 10 + 1, step * 10 + 2], buffer)
        assert len(reader) == 2
        assert reader.pop() == [step * 10 - 10, step * 10 - 9, step * 10 - 8]
    assert reader.pop() == [190, 191, 192]
    assert len(reader) == 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("unread", range(1, 9))
def test_the_oldest_unread_steps_are_dropped(device: str, unread: int) -> None:
    """Whatever the phase of its ring of buffers, the two newest are kept whole."""
    reader = TokenReader(2, torch.device(device))
    buffer = torch.zeros(2, dtype=torch.int64, device=device)
    for step in range(unread):
        push(reader, [step, -step], buffer)
    kept = list(range(unread))[-2:]
    assert [reader.pop() for _ in range(len(reader))] == [[step, -step] for step in kept]


def test_an_unread_step_is_never_overwritten() -> None:
    reader = TokenReader(1, torch.device("cpu"))
    buffer = torch.zeros(1, dtype=torch.int64)
    for step in range(12):
        push(reader, [step], buffer)
        if step % 3 == 0:  # reads lag and catch up
            continue
        oldest = step - len(reader) + 1
        assert reader.pop() == [oldest]


@pytest.mark.parametrize("place", places(EAGER, PADDED, *GPU))
def test_decoding_delivers_what_the_device_sampled(place: Place) -> None:
    lab = Lab(place)
    requests, first = lab.prefill(prompts_of(21, 4, 33))
    decoder = lab.decoder(4)
    decoder.start(requests, first.argmax(-1))
    sampled, read = [], []
    for _ in range(12):
        decoder.step()
        sampled.append(decoder.state.input_ids_B[:3].tolist())
        if len(decoder.reader) > 1:
            read.append(decoder.reader.pop())
    read.append(decoder.reader.pop())
    assert read == sampled
    decoder.step()
    decoder.start(requests[:1], [7])  # tokens of another batch are not this batch's
    assert len(decoder.reader) == 0
