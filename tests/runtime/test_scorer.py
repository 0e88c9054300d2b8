"""Scoring with exits: against a slow reference position by position, whatever the batch and the chunks are."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from offramp.cli import main
from offramp.commands.scoring import score_texts, windows
from offramp.errors import DataError, InputError, OptionError
from offramp.policy import Policy
from offramp.runtime.kv_cache import KeyValueCache
from offramp.runtime.scorer import Scored, Scorer, perplexity
from tests import decoders

GATES = (0.5, 0.45)
GATED = Policy.thresholds("learned", GATES)
TEXTS = [
    [(5 * n + 3 * at * at + 11) % decoders.VOCABULARY for at in range(length)]
    for n, length in enumerate((9, 60, 2, 31, 25, 1))
]
LOG_PROB_ATOL = 1e-4  # float32 over other shapes, of values down to -14


def scored(bundle: Path, policy: Policy, max_batch: int = 3, chunk: int = 24) -> list[Scored]:
    with Scorer.open(bundle, policy, threads=1, max_batch=max_batch, chunk=chunk) as scorer:
        return scorer.score(TEXTS)


def test_leaving_is_what_the_slow_reference_does(decoder_bundle: Path) -> None:
    found = scored(decoder_bundle, GATED)
    for tokens, text in zip(TEXTS, found, strict=True):
        log_probs, exits = decoders.scored(tokens, GATES)
        assert text.exit_index.tolist() == exits
        np.testing.assert_allclose(text.log_probs, log_probs, atol=LOG_PROB_ATOL)
    assert {0, 1, 2} == set(np.concatenate([text.exit_index for text in found]).tolist())


def test_with_all_exits_closed_it_is_the_model(decoder_bundle: Path) -> None:
    never = (2.0, 2.0)
    for tokens, text in zip(TEXTS, scored(decoder_bundle, Policy.full_depth()), strict=True):
        np.testing.assert_allclose(text.log_probs, decoders.scored(tokens, never)[0], atol=LOG_PROB_ATOL)


@pytest.mark.parametrize(
    "policy",
    [
        GATED,
        Policy.thresholds("max_prob", [0.1, 0.12]),
        Policy.thresholds("max_prob", [0.0, None]),
        Policy("max_prob", (0.0, 0.1), patience=2, temperatures=(2.0, 0.5, 1.5)),
    ],
)
def test_a_text_does_not_depend_on_batch_and_chunks(decoder_bundle: Path, policy: Policy) -> None:
    alone = scored(decoder_bundle, policy, max_batch=1)
    for max_batch, chunk in ((2, 5), (6, 24)):
        for one, other in zip(alone, scored(decoder_bundle, policy, max_batch, chunk), strict=True):
            np.testing.assert_array_equal(one.exit_index, other.exit_index)
            np.testing.assert_allclose(one.log_probs, other.log_probs, atol=LOG_PROB_ATOL)


def test_positions_that_left_are_not_computed(decoder_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Scorer.open(decoder_bundle, GATED, threads=1, max_batch=3) as scorer:
        asked: list[tuple[int, int]] = []
        brought: list[tuple[int, int]] = []
        logits, advance = scorer.decoder.logits, scorer.decoder.advance

        def counted(index, low, counts, active=None, **how):
            brought.append((index, sum(counts if active is None else map(len, active))))
            return advance(index, low, counts, active, **how)

        monkeypatch.setattr(
            scorer.decoder,
            "logits",
            lambda k, hidden: asked.append((k, len(hidden))) or logits(k, hidden),
        )
        monkeypatch.setattr(scorer.decoder, "advance", counted)
        found = scorer.score(TEXTS)
    exits = np.concatenate([text.exit_index for text in found])
    for index in range(3):
        assert sum(number for k, number in asked if k == index) == (exits == index).sum()
    for index in (1, 2):
        assert sum(number for k, number in brought if k == index) == (exits >= index).sum()


def test_only_the_past_of_texts_that_go_on_is_there(decoder_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a call is given as its past is attended to: a long text must leave nothing behind for a short one."""
    given: list[int] = []
    reserved = KeyValueCache.past

    def spied(cache, low, high):
        views = reserved(cache, low, high)
        given.append(next(iter(views.values())).shape[2])
        return views

    monkeypatch.setattr(KeyValueCache, "past", spied)
    with Scorer.open(decoder_bundle, Policy.full_depth(), threads=1, max_batch=3, chunk=24) as scorer:
        scorer.score(TEXTS[1:2])  # 59 positions in chunks of 24
        assert given == [1] * 3 + [64] * 6  # each new shape of a call takes its views anew
        assert scorer.decoder.filled(0).tolist() == [48, 0, 0]  # what no chunk comes after is not kept
        given.clear()
        scorer.score(TEXTS[:1])
        assert given == [1] * 3
        assert not scorer.decoder.filled(0).any()


def test_what_all_exits_say(decoder_bundle: Path) -> None:
    """The final exit says what scoring at full depth does; a gate that is sure enough is where a position leaves."""
    with Scorer.open(decoder_bundle, Policy.full_depth(), threads=1, max_batch=2, chunk=7) as scorer:
        said, full = scorer.said(TEXTS), scorer.score(TEXTS)
    for each, text in zip(said, full, strict=True):
        np.testing.assert_allclose(each.log_probs[:, -1], text.log_probs, atol=LOG_PROB_ATOL)
        assert np.isnan(each.learned[:, -1]).all()
        assert (each.learned[:, :-1] > 0).all()
    first = scored(decoder_bundle, Policy.thresholds("learned", [GATES[0], None]))
    for each, text in zip(said, first, strict=True):
        np.testing.assert_array_equal(each.learned[:, 0] >= GATES[0], text.exit_index == 0)
        leaving = text.exit_index == 0
        np.testing.assert_allclose(each.log_probs[leaving, 0], text.log_probs[leaving], atol=LOG_PROB_ATOL)


def test_the_command_reports_perplexity_and_exits(decoder_bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "texts.npz"
    np.savez(path, input_ids=np.array([TEXTS[1], TEXTS[1][::-1]]))
    arguments = ["score", str(decoder_bundle), "--data", str(path), "--score", "learned", "--threshold", "0.5,0.45"]
    done = CliRunner().invoke(main, [*arguments, "--json", "--threads", "1"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    with Scorer.open(decoder_bundle, GATED, threads=1) as scorer:
        wanted = scorer.score([TEXTS[1], TEXTS[1][::-1]])
    assert report["perplexity"] == pytest.approx(perplexity(wanted), rel=1e-4)
    assert report["num_tokens"] == 2 * (len(TEXTS[1]) - 1)
    assert sum(report["exit_shares"]) == pytest.approx(1)
    assert report["mean_depth"] == pytest.approx(np.concatenate([text.exit_index for text in wanted]).mean() + 1)


def test_a_text_longer_than_the_bundle_takes_becomes_several(decoder_bundle: Path, tmp_path: Path) -> None:
    with Scorer.open(decoder_bundle, threads=1) as scorer:
        found = windows(scorer, [list(range(200)), [1, 2]])
        assert found == [list(range(96)), list(range(96, 192)), list(range(192, 200)), [1, 2]]
        np.savez(tmp_path / "short.npz", input_ids=np.ones((3, 1), np.int64))
        with pytest.raises(DataError, match="got 3 texts of one token or none"):
            score_texts(scorer, str(tmp_path / "short.npz"))


def test_what_is_refused(decoder_bundle: Path) -> None:
    with pytest.raises(OptionError, match="got a chunk of 0"):
        Scorer.open(decoder_bundle, chunk=0)
    with pytest.raises(OptionError, match="3 thresholds, the model has 3 exits"):
        Scorer.open(decoder_bundle, Policy.thresholds("max_prob", [0.5] * 3))
    with Scorer.open(decoder_bundle, threads=1) as scorer, pytest.raises(InputError, match="no tokenizer"):
        scorer.score(["a text"])
