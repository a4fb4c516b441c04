import json
import lzma

import pytest
from transformers import AutoTokenizer

from linearize.errors import LinearizeError
from linearize.eval import text as text_module
from linearize.eval.text import evaluation_text, held_out_text
from linearize.recipe import Data


@pytest.fixture
def tokenizer(make_teacher):
    return AutoTokenizer.from_pretrained(make_teacher())


@pytest.mark.parametrize("end", ["", ".xz"])
def test_a_text_file_is_one_document_in_rows_of_any_length(tmp_path, tokenizer, end) -> None:
    words = "\n\n".join(f"Line {index} of the book." for index in range(3000))
    path = tmp_path / f"book.txt{end}"
    path.write_bytes(lzma.compress(words.encode()) if end else words.encode())
    text = evaluation_text(str(path), tokenizer, rows=3, length=20_000)  # longer than a reader's pieces of 8,192
    assert (text.name, text.rows.input_ids.shape) == ("book", (3, 20_000))
    assert (text.rows.position_ids.max(1).values == 19_999).all()
    assert tokenizer.decode(text.rows.input_ids.flatten()) == words[:60_000]
    with pytest.raises(LinearizeError, match="does not fill one row of 90000"):
        evaluation_text(str(path), tokenizer, rows=1, length=90_000)


def test_separators_part_the_documents_of_a_file(tmp_path, tokenizer) -> None:
    (tmp_path / "two.txt").write_text("a" * 30 + "\n<|endoftext|>\n" + "b" * 34)
    text = evaluation_text(str(tmp_path / "two.txt"), tokenizer, rows=9, length=64)
    assert (text.rows.position_ids[0] == 0).nonzero().flatten().tolist() == [0, 30]


def test_rows_of_other_files_are_documents(tmp_path, tokenizer) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": word * 40}) + "\n" for word in "abcd"))
    text = evaluation_text(str(tmp_path / "rows.jsonl"), tokenizer, rows=2, length=64)
    assert len(text.rows) == 2
    assert (text.rows.position_ids == 0).sum() > 2


def test_wikitext_is_joined_as_the_field_does(tokenizer, monkeypatch) -> None:
    asked = []

    def rows(*arguments, **_):
        asked.append(arguments)
        return [{"text": ""}, {"text": " = Title = \n"}, {"text": " Words .\n"}]

    monkeypatch.setattr(text_module, "hub_rows", rows)
    text = evaluation_text("wikitext2", tokenizer, rows=1, length=24)
    assert tokenizer.decode(text.rows.input_ids[0]) == "\n\n = Title = \n\n\n Words .\n"[:24]
    assert asked == [("Salesforce/wikitext:wikitext-2-raw-v1", "test")]
    assert text.name == "wikitext2"


def test_the_fingerprint_follows_the_rows(tokenizer) -> None:
    data = Data(source="builtin", length=64, held_out=4)
    first, again = held_out_text(data, tokenizer, 0), held_out_text(data, tokenizer, 7)
    assert first.fingerprint == again.fingerprint  # what is held out does not depend on the seed
    assert first.fingerprint != held_out_text(data.model_copy(update={"held_out": 3}), tokenizer, 0).fingerprint
    with pytest.raises(LinearizeError, match="no such file"):
        evaluation_text("./missing.txt", tokenizer, 1, 64)
