"""Pages for decode steps: asked for every few steps, one token at a time when few are left, and never past a limit."""

from __future__ import annotations

import pytest

from fa_research.config import GraphMode
from fa_research.errors import ConfigError, KVCacheFull
from tests.engine.lab import EAGER, FA3, PADDED, TRITON, Lab, Place, decode, places, prompts_of
from tests.kv_cache.states import cache_state

BOTH = pytest.mark.parametrize("place", places(EAGER, PADDED))


@BOTH
@pytest.mark.parametrize("ahead", [1, 4])
def test_pages_are_asked_for_every_few_steps(place: Place, ahead: int) -> None:
    lab = Lab(place, page_size=1)
    prompts = prompts_of(10, 3)
    requests, first = lab.prefill(prompts)
    decoder = lab.decoder(2, reserve_ahead=ahead)
    used = []
    decode(decoder, requests, prompts, first, 9, lambda step: used.append(lab.cache.allocator.pages_used))
    used.append(lab.cache.allocator.pages_used)
    grown = [step for step in range(9) if used[step + 1] > used[step]]
    assert grown == list(range(0, 9, ahead))
    assert used[-1] == 13 + 2 * -(-9 // ahead) * ahead


@BOTH
def test_a_new_batch_has_no_logits_before_its_first_step(place: Place) -> None:
    lab = Lab(place)
    prompts = prompts_of(9, 6)
    requests, first = lab.prefill(prompts)
    decoder = lab.decoder(2)
    decode(decoder, requests, prompts, first, 1)
    assert decoder.logits_BX is not None
    decoder.start(requests[1:], [1])
    assert decoder.logits_BX is None


@BOTH
def test_a_nearly_full_pool_is_used_to_its_last_slot(place: Place) -> None:
    """Fewer pages than `kv.reserve_ahead` asks for: it goes on one token at a time; when nothing is left it says so,
    changes nothing, and goes on rightly once pages are free."""
    lab = Lab(place, page_size=4, num_pages=10)
    prompts = prompts_of(9, 6)  # 3 + 2 pages
    requests, first = lab.prefill(prompts)
    blocker = lab.cache.open()
    lab.cache.extend([blocker], [12])  # 3 more: 2 are left
    decoder = lab.decoder(2, reserve_ahead=16)
    done = decode(decoder, requests, prompts, first, 6)  # 15 and 12 tokens: 4 + 3 pages
    assert lab.cache.allocator.pages_free == 0
    fed = [sequence[:-1] for sequence in done.sequences]
    for sequence, logits in zip(fed, done.logits, strict=True):
        lab.check(sequence, logits)
    state = cache_state(lab.cache)
    with pytest.raises(KVCacheFull) as failure:
        decoder.step()
    assert (failure.value.requested, failure.value.free) == (1, 0)
    assert cache_state(lab.cache) == state
    lab.cache.close(blocker)
    last = [logits[-1:] for logits in done.logits]
    for _ in range(3):
        decoder.step()
        assert decoder.logits_BX is not None
        fed = [
            [*sequence, int(logits.argmax())]
            for sequence, logits in zip(fed, (row[-1] for row in last), strict=True)
        ]
        last = [row.clone()[None] for row in decoder.logits_BX]
        for sequence, logits in zip(fed, last, strict=True):
            lab.check(sequence, logits)


@pytest.mark.parametrize("page_size", [1, 16, 128])
@pytest.mark.parametrize("place", places(EAGER, PADDED, FA3, TRITON))
def test_known_failure_7_exactly_the_context_limit(place: Place, page_size: int) -> None:
    """The last token that fits is right; one further is refused by the limit's name and changes nothing."""
    limit = 50
    lab = Lab(place, page_size, max_context_len=limit)
    prompts = prompts_of(43, 20)
    requests, first = lab.prefill(prompts)
    decoder = lab.decoder(2, reserve_ahead=4)
    result = decode(decoder, requests, prompts, first, 7)
    for sequence, logits in zip(result.sequences, result.logits, strict=True):
        lab.check(sequence[:-1], logits)
    assert requests[0].seq_len == limit
    state = cache_state(lab.cache)
    with pytest.raises(ConfigError, match=f"51 tokens passes the context limit of {limit} tokens"):
        decoder.step()
    assert cache_state(lab.cache) == state
    with pytest.raises(ConfigError, match=f"context limit of {limit} tokens"):
        lab.runner.extend([requests[0]], [[1]])
    assert cache_state(lab.cache) == state
    (whole,) = prompts_of(limit, seed=3)
    _, logits = lab.prefill([whole])
    lab.check(whole, logits)


@pytest.mark.parametrize("place", places(PADDED, TRITON))
def test_known_failure_7_captured_steps_end_at_their_own_bound(place: Place) -> None:
    """A static page table narrower than the context limit is never read past its end."""
    lab = Lab(place, page_size=4)
    prompts = prompts_of(17, 5)
    requests, first = lab.prefill(prompts)
    decoder = lab.decoder(2, bound=24, reserve_ahead=16)
    result = decode(decoder, requests, prompts, first, 7)
    for sequence, logits in zip(result.sequences, result.logits, strict=True):
        lab.check(sequence[:-1], logits)
    with pytest.raises(ConfigError, match="25 tokens passes the context limit of 24 tokens"):
        decoder.step()
    eager = lab.decoder(2, mode=GraphMode.off)  # which has no such bound
    prompts = [sequence[:-1] for sequence in result.sequences]
    first = decoder.logits_BX.clone()  # type: ignore[union-attr]
    further = decode(eager, requests, prompts, first, 4)
    for sequence, logits in zip(further.sequences, further.logits, strict=True):
        lab.check(sequence[:-1], logits)


def test_a_request_without_new_tokens_is_refused_and_changes_nothing() -> None:
    lab = Lab(EAGER)
    requests, _ = lab.prefill(prompts_of(5, 9))
    state = cache_state(lab.cache)
    for new in ([[1], []], [[], []], []):
        with pytest.raises(ConfigError, match="at least one new token"):
            lab.runner.extend(requests[: len(new)], new)
        with pytest.raises(ConfigError, match="at least one new token"):
            lab.runner.extend_in_chunks(requests[: len(new)], new, 4)
    assert cache_state(lab.cache) == state


def test_an_extend_pass_that_does_not_fit_changes_nothing() -> None:
    lab = Lab(EAGER, page_size=4, num_pages=6)
    requests, _ = lab.prefill(prompts_of(5, 9))  # 2 + 3 pages
    state = cache_state(lab.cache)
    with pytest.raises(KVCacheFull) as failure:
        lab.runner.extend(requests, prompts_of(3, 8))
    assert (failure.value.requested, failure.value.free) == (2, 1)
    assert cache_state(lab.cache) == state


@pytest.mark.parametrize("chunk_size", [1, 5, 16, 40])
def test_chunked_prefill_is_one_prefill(chunk_size: int) -> None:
    lab = Lab(EAGER, page_size=4)
    prompts = prompts_of(21, 4, 33)
    requests = [lab.cache.open() for _ in prompts]
    logits_BX = lab.runner.extend_in_chunks(requests, prompts, chunk_size)
    assert logits_BX is not None
    for prompt, logits in zip(prompts, logits_BX, strict=True):
        lab.check(prompt, logits[None])
    assert [r.seq_len for r in requests] == [21, 4, 33]
