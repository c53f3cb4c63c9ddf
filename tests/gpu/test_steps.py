"""What a decode step may not do: allocate device memory, wait for the device, or launch more than its graph."""

from __future__ import annotations

import warnings

import pytest
import torch

from fa_research.config import GraphMode
from fa_research.engine.decode import DecodeRunner
from fa_research.masks import Chunked
from tests.caches import no_synchronisation
from tests.engine.lab import FA2, FA3, GPU, PADDED, TRITON, TRITON_EAGER, Lab, Place, places, prompts_of

STEPS = {"cpu": 60, "cuda": 1000}


def started(place: Place, steps: int, *, reserved: bool, sink: bool = False) -> tuple[Lab, DecodeRunner]:
    lab = Lab(place, max_context_len=40 + steps + 20, max_requests=4, mask=Chunked(128), sink=sink)
    requests, first = lab.prefill(prompts_of(21, 4, 33))
    decoder = lab.decoder(4, reserve_ahead=16)
    if reserved:
        lab.cache.reserve(requests, [r.seq_len + steps + 10 for r in requests])
    decoder.start(requests, first.argmax(-1))
    for _ in range(4):
        decoder.step()
    return lab, decoder


def allocations() -> int:
    return int(torch.cuda.memory_stats()["allocation.all.allocated"])


@pytest.mark.gpu
@pytest.mark.parametrize("place", places(FA3, FA2, TRITON))
def test_a_thousand_steps_allocate_no_device_memory(place: Place) -> None:
    """With the pages reserved, not one allocation; asking for pages on the way, none that stays or grows the pool."""
    _, decoder = started(place, STEPS["cuda"], reserved=True)
    torch.cuda.synchronize()
    before = allocations(), torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for _ in range(STEPS["cuda"]):
        decoder.step()
    torch.cuda.synchronize()
    assert (allocations(), torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == before
    _, decoder = started(place, STEPS["cuda"], reserved=False)
    torch.cuda.synchronize()
    kept = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for _ in range(STEPS["cuda"]):
        decoder.step()
    torch.cuda.synchronize()
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == kept


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("place", places(PADDED, *GPU, TRITON_EAGER))
def test_no_step_waits_for_the_device(place: Place, sink: bool) -> None:
    """Graph replays, pages on the way, chunks and sinks rewritten or native; tokens are read once it is over."""
    lab, decoder = started(place, STEPS["cpu"], reserved=False, sink=sink)
    with no_synchronisation():
        for _ in range(STEPS["cpu"]):
            decoder.step()
    assert decoder.reader.pop() and decoder.reader.pop()
    decoder.flush()
    assert decoder.ran_eagerly == (place.mode is GraphMode.off)
    lengths = decoder.state.seq_lens_B[:3].tolist()
    assert lengths == [n + STEPS["cpu"] + 4 for n in (21, 4, 33)]
    lab.cache.check()


@pytest.mark.parametrize("place", places(PADDED, *GPU))
def test_no_extend_pass_waits_for_the_device(place: Place) -> None:
    """Allocation, batch, metadata, chunks and the model, with a cached prefix and without."""
    lab = Lab(place, max_context_len=700, mask=Chunked(128), max_requests=6)
    prompts = prompts_of(300, 5, 131)
    warm = [lab.cache.open() for _ in prompts]
    lab.runner.extend(warm, prompts)  # compiles what is to be compiled
    lab.runner.extend(warm, prompts_of(1, 200, 77))
    requests = [lab.cache.open() for _ in prompts]
    more = prompts_of(1, 200, 77, seed=5)
    with no_synchronisation():
        lab.runner.extend(requests, prompts)
        logits = lab.runner.extend(requests, more)
    assert logits is not None
    for prompt, tokens, row in zip(prompts, more, logits, strict=True):
        lab.check([*prompt, *tokens], row[None])


@pytest.mark.gpu
@pytest.mark.parametrize("place", places(FA3, TRITON))
def test_a_decode_step_is_one_launch(place: Place) -> None:
    """What the host asks of the driver in a step: one graph, the copy of the tokens, and an event."""
    _, decoder = started(place, 40, reserved=True)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the profiler's own, which differ between versions
        with torch.profiler.profile(activities=activities) as profile:
            for _ in range(10):
                decoder.step()
            torch.cuda.synchronize()
    calls = {event.key: event.count for event in profile.key_averages() if event.key.startswith("cu")}
    if not calls:
        pytest.skip("the profiler is not allowed to see the driver's calls here")
    launches = {name: count for name, count in calls.items() if "Launch" in name}
    assert launches == {"cudaGraphLaunch": 10}, calls
    assert sum(count for name, count in calls.items() if "Memcpy" in name) == 10, calls


@pytest.mark.gpu
def test_graphs_share_their_memory() -> None:
    """Capturing more batch sizes than the largest costs next to nothing."""
    lab = Lab(TRITON, max_context_len=256)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    one = lab.decoder(64)
    middle = torch.cuda.memory_reserved()
    many = lab.decoder(1, 2, 4, 8, 16, 32, 64)
    after = torch.cuda.memory_reserved()
    assert one.graphs is not None and many.graphs is not None
    assert after - middle <= 2 * (middle - before) + (4 << 20)
