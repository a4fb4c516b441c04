import csv
import gzip
import json
import lzma
import subprocess
import sys

import datasets
import pytest

from linearize.data import load_documents
from linearize.data.sources import builtin_rows
from linearize.errors import LinearizeError
from linearize.recipe import Data

TEXTS = ["first document", 'second, with "quotes"\nand a line', "third: äöü"]
ROWS = [{"text": text} for text in TEXTS]


def texts(source, **settings):
    return [document.turns[0][1] for document in load_documents(Data(source=source, **settings))]


def write(path, rows=ROWS):
    kind = path.suffixes[0]
    if kind == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
        return str(path)
    opener = {".xz": lzma.open, ".gz": gzip.open}.get(path.suffix, open)
    with opener(path, "wt", encoding="utf-8", newline="") as file:
        if kind in (".jsonl", ".ndjson"):
            file.writelines(json.dumps(row) + "\n" for row in rows)
        elif kind == ".json":
            json.dump({"version": 1, "data": rows}, file)
        elif kind == ".csv":
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.write("\n<|endoftext|>\n".join(row["text"] for row in rows))
    return str(path)


@pytest.mark.parametrize(
    "name",
    ["a.jsonl", "a.ndjson", "a.json", "a.csv", "a.parquet", "a.txt", "a.md", "a.jsonl.xz", "a.txt.gz", "a.csv.xz"],
)
def test_every_file_type_gives_the_same_documents(tmp_path, name):
    assert texts(write(tmp_path / name)) == TEXTS


def test_json_lines_named_json_are_read(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert texts(str(path)) == TEXTS


def test_a_book_in_one_text_file_is_cut_at_blank_lines(tmp_path):
    paragraphs = [f"{index} " + "word " * 400 for index in range(20)]
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(paragraphs))
    pieces = texts(str(path))
    assert len(pieces) > 3
    assert "\n\n".join(pieces).split() == "\n\n".join(paragraphs).split()
    assert all(piece[0].isdigit() for piece in pieces)


def test_a_folder_gives_the_files_of_its_split(tmp_path):
    write(tmp_path / "train-0.jsonl", ROWS[:1])
    write(tmp_path / "train-1.jsonl", ROWS[1:2])
    write(tmp_path / "test.jsonl", ROWS[2:])
    assert texts(str(tmp_path)) == TEXTS[:2]
    assert texts(str(tmp_path), split="test") == TEXTS[2:]
    with pytest.raises(LinearizeError, match=r"split 'dev'.*test\.jsonl"):
        texts(str(tmp_path), split="dev")


def test_a_folder_without_split_names_gives_all_files(tmp_path):
    (tmp_path / "b").mkdir()
    write(tmp_path / "a.jsonl", ROWS[:1])
    write(tmp_path / "b" / "c.txt", ROWS[1:])
    (tmp_path / "README.md").write_text("About these files.")
    assert texts(str(tmp_path)) == TEXTS


def test_sources_are_mixed_in_turn_and_repeats_left_out(tmp_path):
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    write(one, [{"text": "a"}, {"text": "b"}, {"text": "a"}])
    write(two, [{"text": "c"}, {"text": "b"}, {"text": "d"}])
    assert texts([str(one), str(two)]) == ["a", "c", "b", "d"]


def test_rows_are_read_only_as_they_are_asked_for(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n{damaged")
    documents = load_documents(Data(source=str(path)))
    assert next(documents).turns[0][1] == TEXTS[0]
    with pytest.raises(LinearizeError, match=r"a\.jsonl as jsonl: line 2"):
        next(documents)


def test_builtin_topics_do_not_repeat_each_other():
    paragraphs = [
        {" ".join(part.split()) for part in row["text"].split("\n\n") if len(part) > 120} for row in builtin_rows()
    ]
    sizes = [sum(map(len, own)) for own in paragraphs]
    assert sum(sizes) > 200_000
    for index, own in enumerate(paragraphs):
        for other in paragraphs[index + 1 :]:
            assert sum(map(len, own & other)) <= 0.01 * sum(sizes)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt"])
def test_an_empty_file_is_reported(tmp_path, name):
    (tmp_path / name).write_text("\n")
    with pytest.raises(LinearizeError, match=f"{name}' is empty"):
        texts(str(tmp_path / name))


def test_a_missing_file_has_near_matches(tmp_path):
    write(tmp_path / "books_train.jsonl")
    with pytest.raises(LinearizeError, match=r"no such file.*Did you mean .*books_train\.jsonl"):
        texts(str(tmp_path / "book_train.jsonl"))


def test_an_unknown_file_type_lists_the_known_ones(tmp_path):
    path = tmp_path / "a.pkl"
    path.write_bytes(b"x")
    with pytest.raises(LinearizeError, match=r"Unknown file type '\.pkl'.*a\.pkl.*\.parquet"):
        texts(str(path))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b"[1, 2]\n"),
        ("a.jsonl.xz", b"no xz"),
        ("a.txt.gz", gzip.compress(b"text" * 100)[:-20]),
        ("a.parquet", b"no parquet"),
        ("a.txt", b"\xff\xfe\xff"),
    ],
)
def test_damaged_files_are_reported_by_name(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(LinearizeError, match=f"Cannot read .*{name}"):
        texts(str(tmp_path / name))


def test_a_split_of_a_source_that_has_none_is_an_error():
    with pytest.raises(LinearizeError, match=r"data\.split` is 'test'"):
        texts("builtin", split="test")


def test_a_hub_dataset_goes_through_datasets(monkeypatch):
    asked = {}

    def load_dataset(name, config, split, streaming):
        asked.update(name=name, config=config, split=split, streaming=streaming)
        rows = datasets.Dataset.from_list(ROWS)
        return rows.to_iterable_dataset() if streaming else rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert texts("owner/corpus:small", streaming=True) == TEXTS
    assert asked == {"name": "owner/corpus", "config": "small", "split": "train", "streaming": True}
    assert sorted(texts("owner/corpus")) == sorted(TEXTS)


def test_a_hub_dataset_that_cannot_be_had_is_reported(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'owner/corpus' doesn't exist on the Hub.")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(LinearizeError, match=r"'owner/corpus'.*doesn't exist"):
        texts("owner/corpus")


def test_reading_never_unpickles(tmp_path):
    path = write(tmp_path / "a.parquet")
    code = (
        "import pickle; pickle.load = pickle.loads = None\n"
        "from linearize.data import load_documents; from linearize.recipe import Data\n"
        f"print(len(list(load_documents(Data(source={path!r})))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "3", done.stderr


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet", "a.jsonl.gz"])
def test_files_at_a_url_are_streamed(tmp_path, name):
    write(tmp_path / name)
    assert texts(f"file://{tmp_path}/{name}") == TEXTS


@pytest.mark.parametrize(
    ("source", "settings", "words"),
    [
        ("s3://bucket/a.txt", {}, "their type is not read"),
        ("s3://bucket/a.jsonl", {"split": "test"}, "has no splits"),
        ("file:///nowhere/a.jsonl", {}, "Cannot open 'file:///nowhere/a.jsonl'"),
        ("nothing://bucket/a.jsonl", {}, "Cannot open 'nothing://bucket/a.jsonl'"),
    ],
)
def test_a_url_that_cannot_be_read_is_an_error(source, settings, words):
    with pytest.raises(LinearizeError, match=words):
        texts(source, **settings)
