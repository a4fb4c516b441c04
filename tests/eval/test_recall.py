"""Recall samples: exact in length, the same for a seed, disjoint between splits, scored as greedy decoding would."""

import itertools
import re
from typing import get_args

import pytest
import torch

from linearize.errors import LinearizeError, UnknownNameError
from linearize.eval.recall import TASKS, RecallTask, make_samples, score, wilson
from linearize.eval.recall_templates import KEYS, NOISE, SPLITS, haystack
from linearize.recipe import RecallName

LENGTH = 1200


@pytest.fixture(scope="module")
def model(random_teacher):
    return random_teacher(vocab_size=272)


def texts(samples, tokenizer):
    return [(tokenizer.decode(s.prompt_ids), tokenizer.decode(s.answer_ids)) for s in samples]


def test_recipes_name_the_tasks_that_there_are():
    assert set(get_args(RecallName)) == set(TASKS)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", TASKS)
def test_a_sample_has_its_length_and_holds_its_answer(name, split, byte_tokenizer):
    samples = make_samples(RecallTask(name, LENGTH, 5, seed=1, split=split), byte_tokenizer)
    assert {len(s.prompt_ids) + len(s.answer_ids) for s in samples} == {LENGTH}
    for sample in samples:
        tokens = zip(sample.scored, sample.answer_ids, strict=True)
        parts = [list(group) for on, group in itertools.groupby(tokens, lambda pair: pair[0]) if on]
        values = [byte_tokenizer.decode([token for _, token in part]).strip() for part in parts]
        prompt = byte_tokenizer.decode(sample.prompt_ids)
        assert len(values) == TASKS[name].queries
        for value in values:
            assert value in prompt
            assert re.fullmatch(r"[0-9a-f-]{36}" if name == "s_niah_3" else rf"\d{{{TASKS[name].digits}}}", value)


def test_the_fact_stands_at_its_depth(byte_tokenizer):
    samples = make_samples(RecallTask("s_niah_1", 4000, 5, split="probe", depths=(0.2, 0.6)), byte_tokenizer)
    assert [s.depth for s in samples] == pytest.approx([0.2, 0.3, 0.4, 0.5, 0.6])
    for sample, (prompt, answer) in zip(samples, texts(samples, byte_tokenizer), strict=True):
        assert prompt.index(answer.strip()) / len(prompt) == pytest.approx(sample.depth, abs=0.04)


def test_all_facts_that_are_asked_for_stand_between_the_depths(byte_tokenizer):
    samples = make_samples(RecallTask("mqar", 4000, 8, split="probe", depths=(0.1, 0.4)), byte_tokenizer)
    for sample in samples:
        prompt = byte_tokenizer.decode(sample.prompt_ids)
        values = re.findall(rf"\d{{{TASKS['mqar'].digits}}}", byte_tokenizer.decode(sample.answer_ids))
        assert len(values) == TASKS["mqar"].queries
        assert all(0.06 < prompt.index(value) / len(prompt) < 0.44 for value in values)


def test_the_seed_decides(byte_tokenizer):
    def make(**changes):
        return make_samples(RecallTask(**{"name": "mqar", "length": LENGTH, "count": 3, **changes}), byte_tokenizer)

    assert make() == make()
    assert make() != make(seed=1)
    assert make()[0].answer_ids != make(split="probe")[0].answer_ids


def test_the_splits_have_nothing_in_common(byte_tokenizer):
    def wordings(split):
        return {text for wording in SPLITS[split].values() for text in vars(wording).values()} - {""}

    def words(split):
        return {word for group in KEYS[split] for word in group}

    assert not wordings("probe") & wordings("eval")
    assert not words("probe") & words("eval")
    assert not set(NOISE["probe"]) & set(NOISE["eval"])
    probe, judged = set(haystack("probe", False)), set(haystack("eval", False))
    assert len(probe) > 200 and len(judged) > 200 and not probe & judged
    for name in TASKS:  # the random numbers too: the same seed hides other values
        made = {
            split: {s.answer_ids for s in make_samples(RecallTask(name, LENGTH, 20, split=split), byte_tokenizer)}
            for split in SPLITS
        }
        assert not made["probe"] & made["eval"]


def test_a_score_is_that_of_greedy_decoding(model, byte_tokenizer):
    samples = make_samples(RecallTask("passkey", 600, 3), byte_tokenizer)
    greedy = []
    for sample in samples:  # answers that the model itself would give, and one that it would not
        ids = torch.tensor([sample.prompt_ids])
        for _ in sample.answer_ids:
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
        greedy.append(
            type(sample)(sample.prompt_ids, tuple(ids[0, len(sample.prompt_ids) :].tolist()), 0.5, sample.scored)
        )
    spoiled = type(greedy[0])(greedy[0].prompt_ids, (*greedy[0].answer_ids[:-1], 5), 0.5, greedy[0].scored)
    result = score(model, [*greedy, spoiled], batch=2)
    assert [one.exact for one in result.per_sample] == [True, True, True, False]
    assert result.accuracy == 0.75 and (result.low, result.high) == wilson(3, 4)
    tokens = len(spoiled.answer_ids)
    assert result.per_sample[3].token_accuracy == pytest.approx((tokens - 1) / tokens)


def test_log_probability_counts_scored_tokens_alone(model, byte_tokenizer):
    samples = make_samples(RecallTask("mqar", LENGTH, 2), byte_tokenizer)
    result = score(model, samples, batch=2)
    for sample, one in zip(samples, result.per_sample, strict=True):
        ids = torch.tensor([sample.prompt_ids + sample.answer_ids])
        log_probs = model(ids).logits.detach().log_softmax(-1)[0]
        wanted = sum(
            float(log_probs[len(sample.prompt_ids) - 1 + place, token])
            for place, (token, on) in enumerate(zip(sample.answer_ids, sample.scored, strict=True))
            if on
        )
        assert one.log_prob == pytest.approx(wanted, abs=1e-3)
        assert sum(sample.scored) == 4 * 4  # four digits, four times; the blank before them is the question's
    assert result.log_prob == pytest.approx(sum(one.log_prob for one in result.per_sample) / 2)


def test_lengths_may_differ_and_order_stays(model, byte_tokenizer):
    short, long = (make_samples(RecallTask("passkey", length, 2), byte_tokenizer) for length in (500, 700))
    mixed = score(model, [long[0], short[0], long[1], short[1]], batch=4)
    alone = score(model, [*short, *long], batch=1)
    order = [2, 0, 3, 1]
    assert [s.log_prob for s in mixed.per_sample] == pytest.approx(
        [alone.per_sample[i].log_prob for i in order], abs=1e-3
    )


def test_wilson_interval():
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(500, 500) == pytest.approx((0.99238, 1.0), abs=1e-5)
    assert wilson(50, 100) == pytest.approx((0.40383, 0.59617), abs=1e-5)


def test_mistakes(byte_tokenizer):
    with pytest.raises(UnknownNameError, match="passkey"):
        RecallTask("paskey", 100, 1)
    with pytest.raises(UnknownNameError, match="probe"):
        RecallTask("passkey", 100, 1, split="prob")
    with pytest.raises(LinearizeError, match=r"passkey has \d+ tokens besides its filler, and 60 were asked for"):
        make_samples(RecallTask("passkey", 60, 1), byte_tokenizer)
    with pytest.raises(LinearizeError, match="no recall samples"):
        score(torch.nn.Linear(1, 1), [])
