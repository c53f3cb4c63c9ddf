"""Padded entries of a captured batch size change nothing (known failure 11: NaN from padding), whatever ran before."""

from __future__ import annotations

import pytest
import torch

from fa_research.config import GraphMode
from fa_research.errors import ConfigError
from fa_research.masks import Causal, Chunked, Mask
from tests.engine.lab import EXACT, GPU, INTERPRETED, PADDED, Lab, Place, Session, decode, places, prompts_of

EVERYWHERE = pytest.mark.parametrize("place", places(PADDED, EXACT, *GPU))


def blind_token_zero(lab: Lab) -> None:
    """Token 0, which padded entries hold, has an embedding of NaN, so that all of a padded row is NaN: queries, keys,
    values and logits. Its own logit is 0, which is never the largest, so no real request samples it."""
    lab.model.embedding[0] = float("nan")
    lab.model.head[0] = 0.0


@EVERYWHERE
@pytest.mark.parametrize("mask", [Causal(), Chunked(16)], ids=["causal", "chunked"])
def test_known_failure_11_nan_in_padded_entries_shows_nowhere(place: Place, mask: Mask) -> None:
    lab = Lab(place, mask=mask)
    blind_token_zero(lab)
    prompts = prompts_of(21, 4, 33)
    requests, first = lab.prefill(prompts)
    decoder = lab.decoder(4)
    result = decode(decoder, requests, prompts, first, 12, lambda step: lab.cache.kv.poison([0]))
    assert decoder.padded_size == 4
    assert bool(lab.cache.kv.k(0)[0].isnan().all())  # the padded entry wrote its NaN to the sink page
    for sequence, logits in zip(result.sequences, result.logits, strict=True):
        lab.check(sequence[:-1], logits)


def test_known_failure_11_in_the_interpreted_kernels() -> None:
    lab = Lab(INTERPRETED, num_layers=1)
    blind_token_zero(lab)
    (prompt,) = prompts_of(17)
    requests, first = lab.prefill([prompt])
    result = decode(lab.decoder(4), requests, [prompt], first, 3, lambda step: lab.cache.kv.poison([0]))
    lab.check(result.sequences[0][:-1], result.logits[0])


@EVERYWHERE
def test_padded_writes_stay_in_the_sink_page(place: Place) -> None:
    """A step writes one slot of each request and the sink page, and not a byte elsewhere, also where a request of
    the batch before stood."""
    lab = Lab(place)
    requests, first = lab.prefill(prompts_of(21, 4, 33, 9))
    decoder = lab.decoder(4, reserve_ahead=1)
    decoder.start(requests, first.argmax(-1))
    decoder.step()
    requests = requests[:3]
    decoder.start(requests, first[:3].argmax(-1))
    lab.cache.reserve(requests, [r.seq_len + 1 for r in requests])
    before = [buffer.clone() for buffer in (lab.cache.kv.k_LNKD, lab.cache.kv.v_LNKV)]
    own = [r.pages[r.seq_len // 16] * 16 + r.seq_len % 16 for r in requests]
    decoder.step()
    for old, new in zip(before, (lab.cache.kv.k_LNKD, lab.cache.kv.v_LNKV), strict=True):
        unequal = (old != new) & ~(old.isnan() & new.isnan())
        changed_N = unequal.flatten(2).any(-1).any(0)
        assert {slot for slot in changed_N.nonzero().flatten().tolist() if slot >= 16} == set(own)


@EVERYWHERE
def test_batches_of_any_size_follow_each_other(place: Place) -> None:
    """Smaller after larger and larger after smaller, in and out of the captured sizes, other requests each time."""
    lab = Lab(place)
    session = Session(lab, (21, 4, 33, 12, 7))
    decoder = lab.decoder(1, 2, 4)
    turns = [((0, 1, 2), 4), ((3,), 4), ((4, 0), 4), ((0, 1, 2, 3, 4), 4), ((1, 3, 2, 4), 4), ((2,), 4)]
    for which, padded in zip([which for which, _ in turns], (4, 1, 2, 5, 4, 1), strict=True):
        session.run(decoder, which, 5)
        assert decoder.padded_size == padded
        assert decoder.ran_eagerly == (len(which) > 4)
    session.check()


@EVERYWHERE
def test_another_request_may_be_extended_between_steps(place: Place) -> None:
    """An extend pass in between replaces the backend's metadata and moves pages; decoding goes on as if alone."""
    lab = Lab(place, mask=Chunked(16))
    prompts = prompts_of(21, 4, 33)
    requests, first = lab.prefill(prompts)
    other, (tokens,) = lab.cache.open(), prompts_of(60, seed=9)

    def between(step: int) -> None:
        lab.runner.extend([other], [tokens[step * 5 : step * 5 + 5]])

    result = decode(lab.decoder(4), requests, prompts, first, 12, between)
    for sequence, logits in zip(result.sequences, result.logits, strict=True):
        lab.check(sequence[:-1], logits)
    assert other.seq_len == 60
    last = lab.runner.extend([other], [tokens[:1]])
    assert last is not None
    lab.check([*tokens, tokens[0]], last)


@pytest.mark.parametrize("mode", [GraphMode.off, GraphMode.simulate])
def test_a_row_of_the_batch_does_not_depend_on_its_neighbours(mode: GraphMode) -> None:
    """The same request alone and in any place of any batch: equal in float64."""
    lab = Lab(EXACT)
    prompts = prompts_of(21, 4, 33)
    results = []
    for order in ((0,), (0, 1, 2), (2, 1, 0), (1, 0)):
        requests, first = lab.prefill([prompts[i] for i in order])
        decoder = lab.decoder(1, 2, 4, mode=mode)
        result = decode(decoder, requests, [prompts[i] for i in order], first, 10)
        results.append((result.sequences[order.index(0)], result.logits[order.index(0)]))
        for request in requests:
            lab.cache.close(request)
    for sequence, logits in results[1:]:
        assert sequence == results[0][0]
        torch.testing.assert_close(logits, results[0][1])


def test_an_empty_batch_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least one request"):
        Lab(PADDED).decoder(2).start([], [])
