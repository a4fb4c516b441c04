"""Preference pairs: which rows are pairs, how they lie in a row, and what is refused."""

import json

import pytest

from linearize.data import build_preferences
from linearize.data.preferences import builtin_pairs, encode_answer, turns_of
from linearize.errors import LinearizeError
from linearize.recipe_stages import Preference

USER = {"role": "user", "content": "Q"}
GOOD, BAD = ({"role": "assistant", "content": answer} for answer in ("yes", "no"))


def test_a_pair_is_one_row_of_two_documents(tokenizer, tmp_path) -> None:
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"ask {n} ", "chosen": "good" * 3, "rejected": "bad"} for n in range(12)]
    path.write_text("\n".join(map(json.dumps, rows)))
    corpus = build_preferences(Preference(source=str(path)), tokenizer, length=41, pairs=8, seed=0)
    assert (len(corpus.train), len(corpus.held_out), corpus.train.length) == (8, 1, 41)
    row = corpus.train[:1]
    ids, labels, positions = (t[0].tolist() for t in (row.input_ids, row.labels, row.position_ids))
    for begin, end, answer in ((0, 20, "good" * 3), (20, 41, "bad")):
        labelled = [place for place in range(begin, end) if labels[place] != -100]
        wanted = [*tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id]
        assert [ids[place] for place in labelled] == wanted
        assert positions[begin] == 0 and positions[labelled[-1]] == labelled[-1] - begin
        assert positions[labelled[-1] + 1] == 0 and set(ids[labelled[-1] + 1 : end]) == {tokenizer.eos_token_id}
    again = build_preferences(Preference(source=str(path)), tokenizer, length=41, pairs=8, seed=0)
    other = build_preferences(Preference(source=str(path)), tokenizer, length=41, pairs=8, seed=1)
    assert corpus.fingerprint == again.fingerprint != other.fingerprint


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Q", "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "Q", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    ],
)
def test_messages_with_and_without_their_prompt_are_the_same(row) -> None:
    assert turns_of(row, "chosen", False, "s") == (("user", "Q"), ("assistant", "yes"))
    assert turns_of(row, "rejected", False, "s") == (("user", "Q"), ("assistant", "no"))


def test_only_the_last_answer_of_a_conversation_has_labels(chat_tokenizer) -> None:
    tokenizer = chat_tokenizer
    turns = (("user", "a"), ("assistant", "first"), ("user", "b"), ("assistant", "last"))
    encoded = encode_answer(turns, tokenizer, 200)
    assert tokenizer.decode(encoded.ids) == "<user>a</s><assistant>first</s><user>b</s><assistant>last</s>"
    assert tokenizer.decode([label for label in encoded.labels if label != -100]) == "last</s>"


def test_a_long_prompt_loses_its_front_and_a_long_answer_its_end(tokenizer) -> None:
    encoded = encode_answer((("text", "x" * 50 + "!"), ("text", "abc")), tokenizer, 10)
    assert tokenizer.decode(encoded.ids[:-1]) == "xxxxx!abc" and encoded.ids[-1] == tokenizer.eos_token_id
    encoded = encode_answer((("text", "?!"), ("text", "abcdefghijk")), tokenizer, 10)
    assert tokenizer.decode(encoded.ids) == "!abcdefghi" and encoded.labels[0] == -100


def test_builtin_pairs_are_the_same_words_in_two_orders() -> None:
    pairs = list(builtin_pairs())
    assert len(pairs) > 100 and pairs == list(builtin_pairs())
    assert all(sorted(pair["chosen"]) == sorted(pair["rejected"]) for pair in pairs)
    assert sum(pair["chosen"] != pair["rejected"] for pair in pairs) > 0.99 * len(pairs)


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        ([{"prompt": "Q", "chosen": "yes"}] * 3, {}, "a preference needs prompt, chosen, rejected"),
        ([{"prompt": "Q", "chosen": [USER], "rejected": [USER]}] * 3, {}, "end with the assistant's"),
        ([{"prompt": "Q", "chosen": "yes", "rejected": "yes"}] * 3, {}, "gives 0 pairs whose answers differ"),
        ([{"prompt": "Q", "chosen": [GOOD], "rejected": [BAD]}] * 3, {"format": "text"}, "Set `format: chat`"),
    ],
)
def test_what_is_no_pair_is_named(tokenizer, tmp_path, rows, options, words: str) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(LinearizeError, match=words):
        build_preferences(Preference(source=str(path), **options), tokenizer, length=40, pairs=2, seed=0)
