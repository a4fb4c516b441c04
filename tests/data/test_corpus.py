import json
import random

import pytest
import torch
from safetensors.torch import load_file, save_file

from linearize.data import Corpus, build_corpus, evaluation_rows
from linearize.errors import LinearizeError
from linearize.recipe import Data


@pytest.fixture
def source(tmp_path):
    """Forty documents; document i is made of one letter pair that no other has."""
    letters = random.Random(0)
    path = tmp_path / "source.jsonl"
    rows = [{"text": f"{chr(65 + i)}{chr(97 + i // 2)}" * letters.randint(20, 60)} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def data(source, **settings):
    return Data(source=source, **({"length": 64, "held_out": 6} | settings))


def same(one, two):
    return all(torch.equal(a, b) for a, b in zip(one.tensors().values(), two.tensors().values(), strict=True))


def letters_in(rows, tokenizer):
    return {letter for row in rows.input_ids for letter in tokenizer.decode(row)}


@pytest.mark.parametrize("streaming", [False, True])
def test_no_document_is_trained_and_evaluated_on(source, tokenizer, streaming):
    corpus = build_corpus(data(source, streaming=streaming), tokenizer, train_tokens=10**6, seed=0)
    capitals = [
        {letter for letter in letters_in(rows, tokenizer) if not letter.islower()}
        for rows in (corpus.train, corpus.held_out)
    ]
    assert capitals[0]
    assert capitals[1]
    assert not capitals[0] & capitals[1]


def test_the_held_out_rows_depend_on_the_text_alone(source, tokenizer):
    corpora = [
        build_corpus(data(source), tokenizer, train_tokens=tokens, seed=seed)
        for tokens, seed in ((640, 0), (1280, 0), (640, 1))
    ]
    assert all(same(corpora[0].held_out, other.held_out) for other in corpora)
    assert same(corpora[0].train, corpora[1].train[:10])
    assert not same(corpora[0].train, corpora[2].train)


def test_sizes_follow_the_settings(source, tokenizer):
    corpus = build_corpus(data(source), tokenizer, train_tokens=641, seed=0)
    assert corpus.held_out.input_ids.shape == (6, 64)
    assert corpus.train.input_ids.shape == (11, 64)
    assert "repeated" not in corpus.description


def test_several_documents_share_the_held_out_rows(tokenizer, tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps({"text": chr(97 + i) * 5000}) + "\n" for i in range(20)))
    corpus = build_corpus(data(str(path), held_out=8), tokenizer, train_tokens=1000, seed=0)
    assert len(letters_in(corpus.held_out, tokenizer)) == 8


def test_short_text_repeats_and_says_how_often(source, tokenizer):
    corpus = build_corpus(data(source), tokenizer, train_tokens=10 * 40 * 80, seed=0)
    epochs = 10 * 40 * 80 / corpus.train.tokens
    assert epochs > 1
    assert f"repeated for {epochs:.1f} epochs" in corpus.description


def test_the_fingerprint_covers_rows_and_settings(source, tokenizer):
    def fingerprint(train_tokens=640, seed=0, **settings):
        return build_corpus(data(source, **settings), tokenizer, train_tokens=train_tokens, seed=seed).fingerprint

    assert fingerprint() == fingerprint()
    others = [fingerprint(train_tokens=1280), fingerprint(seed=1), fingerprint(length=32), fingerprint(held_out=5)]
    assert len({fingerprint(), *others}) == 5


def test_a_saved_corpus_comes_back_equal(source, tokenizer, tmp_path):
    corpus = build_corpus(data(source), tokenizer, train_tokens=640, seed=0)
    corpus.save(tmp_path / "corpus")
    again = Corpus.load(tmp_path / "corpus")
    assert same(corpus.train, again.train)
    assert same(corpus.held_out, again.held_out)
    assert (corpus.fingerprint, corpus.description) == (again.fingerprint, again.description)


def test_every_row_begins_as_the_tokenizer_begins_texts(bos_tokenizer, tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps({"text": "abcdefgh" * size}) + "\n" for size in (300, 9, 40, 400, 70, 7)))
    build_corpus(data(str(path)), bos_tokenizer, train_tokens=1280, seed=0).save(tmp_path / "corpus")
    corpus = Corpus.load(tmp_path / "corpus")
    for rows in (corpus.train, corpus.held_out, corpus.with_length(16).train):
        assert (rows.input_ids[:, 0] == bos_tokenizer.bos_token_id).all()
        assert (rows.input_ids[:, 1:] == bos_tokenizer.bos_token_id).sum() < len(rows)  # where documents begin


def test_a_tokenizer_that_puts_nothing_first_leaves_rows_as_they_are(source, tokenizer):
    corpus = build_corpus(data(source), tokenizer, train_tokens=640, seed=0)
    assert corpus.train.bos is None
    assert "bos" not in corpus.settings


def test_a_damaged_saved_corpus_is_refused(source, tokenizer, tmp_path):
    corpus = build_corpus(data(source), tokenizer, train_tokens=640, seed=0)
    corpus.save(tmp_path)
    file = tmp_path / "rows.safetensors"
    tensors = load_file(file)
    tensors["train.input_ids"][0, 0] += 1
    save_file(tensors, file)
    with pytest.raises(LinearizeError, match="fingerprint"):
        Corpus.load(tmp_path)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(LinearizeError, match="incomplete or damaged"):
        Corpus.load(tmp_path)
    with pytest.raises(LinearizeError, match="incomplete or damaged"):
        Corpus.load(tmp_path / "nowhere")


def test_too_little_text_to_hold_out_is_an_error(source, tokenizer):
    with pytest.raises(LinearizeError, match=r"1000 held-out rows of 64 tokens.*data\.held_out"):
        build_corpus(data(source, held_out=1000), tokenizer, train_tokens=640, seed=0)


def test_a_single_document_cannot_be_split(tokenizer, tmp_path):
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps({"text": "word " * 5000}))
    with pytest.raises(LinearizeError, match="never split between training and evaluation"):
        build_corpus(data(str(path)), tokenizer, train_tokens=640, seed=0)


def test_nothing_left_to_train_on_is_an_error(tokenizer, tmp_path):
    path = tmp_path / "two.jsonl"
    path.write_text(json.dumps({"text": "word " * 500}) + "\n" + json.dumps({"text": "a"}) + "\n")
    with pytest.raises(LinearizeError, match="Not enough text"):
        build_corpus(data(str(path)), tokenizer, train_tokens=640, seed=0)


def test_builtin_text_serves_the_demo(tokenizer):
    corpus = build_corpus(Data(length=512, held_out=8), tokenizer, train_tokens=40_000, seed=0)
    assert corpus.held_out.input_ids.shape == (8, 512)
    assert corpus.train.input_ids.shape == (79, 512)


def test_a_test_file_is_evaluated_whole(tokenizer, tmp_path):
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps({"text": letter * 500}) + "\n" for letter in "abc"))
    rows = evaluation_rows(data(str(path), length=100, held_out=12), tokenizer)
    assert len(rows) == 12
    assert letters_in(rows, tokenizer) == {"a", "b", "c"}
    assert len(evaluation_rows(data(str(path), length=100, held_out=50), tokenizer)) == 15
    with pytest.raises(LinearizeError, match="does not fill one row of 5000 tokens"):
        evaluation_rows(data(str(path), length=5000), tokenizer)
