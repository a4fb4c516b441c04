"""What `linearize generate` writes, and that a conversation goes on from its state."""

import io
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from linearize import cli
from linearize.api import load
from linearize.errors import LinearizeError
from linearize.generation import Writer
from linearize.modeling.export import save_checkpoint
from linearize.recipe import Recipe
from linearize.surgery import convert

TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'][0] + '>' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)
FORGETFUL = "{{ '[' ~ messages | length ~ ']' }}" + TEMPLATE


@pytest.fixture(scope="module")
def make_folder(tmp_path_factory: pytest.TempPathFactory, random_teacher, byte_tokenizer):
    """A finished folder of an untrained model that reads bytes."""

    def make(template: str | None = None) -> Path:
        folder = tmp_path_factory.mktemp("talk")
        model = random_teacher("llama", vocab_size=272)
        convert(model, {**Recipe.from_yaml("liger").mixer.model_dump(), "window": {"size": 6, "sinks": 2}}, [0, 1])
        tokenizer = AutoTokenizer.from_pretrained(
            byte_tokenizer.save_pretrained(folder / "tokenizer")[0].rpartition("/")[0]
        )
        tokenizer.chat_template = template
        save_checkpoint(model, tokenizer, folder / "out")
        return folder / "out"

    return make


@pytest.fixture(scope="module")
def talker(make_folder) -> Path:
    return make_folder(TEMPLATE)


def tokens_read(writer: Writer, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the tokens of every forward pass."""
    lengths: list[int] = []
    forward = writer.model.forward

    def counted(*args: object, **inputs: object) -> object:
        lengths.append(inputs["input_ids"].shape[1])
        return forward(*args, **inputs)

    monkeypatch.setattr(writer.model, "forward", counted)
    return lengths


def test_a_text_is_written_as_generate_writes_it(talker) -> None:
    writer = Writer(talker, max_new_tokens=9)
    model, tokenizer = load(talker), AutoTokenizer.from_pretrained(talker)
    ids = torch.tensor([tokenizer("Once upon").input_ids])
    expected = model.generate(ids, max_new_tokens=9, do_sample=False)[0, ids.shape[1] :]
    for _ in range(2):  # a text does not see the one before it
        assert "".join(writer.text("Once upon")) == tokenizer.decode(expected, skip_special_tokens=True)


def test_a_conversation_is_laid_out_by_the_template(talker) -> None:
    writer = Writer(talker, max_new_tokens=6)
    first = "".join(writer.answer("hello"))
    second = "".join(writer.answer("more"))
    assert [message["role"] for message in writer.messages] == ["user", "assistant"] * 2
    whole = writer.tokenizer.apply_chat_template(writer.messages[:3], add_generation_prompt=True, tokenize=False)
    assert whole == f"<u>hello\n<a>{first}\n<u>more\n<a>"
    fresh = Writer(talker, max_new_tokens=6)
    assert "".join(fresh.text(whole)) == second


def test_what_the_state_has_seen_is_not_read_again(talker, monkeypatch) -> None:
    """The model is made to write one byte, so that the answer is encoded as it was written."""
    writer = Writer(talker, max_new_tokens=4)
    monkeypatch.setattr(
        writer.model.lm_head, "weight", torch.nn.Parameter(torch.zeros_like(writer.model.lm_head.weight))
    )
    head = writer.model.lm_head
    byte = writer.tokenizer("x").input_ids[0]
    head.bias = torch.nn.Parameter(torch.nn.functional.one_hot(torch.tensor(byte), 272).float())
    lengths = tokens_read(writer, monkeypatch)
    assert "".join(writer.answer("hello")) == "xxxx"
    before = len(writer.tokenizer("<u>hello\n<a>xxxx").input_ids) - 1
    assert writer._cache.get_seq_length() == before
    lengths.clear()
    assert "".join(writer.answer("more")) == "xxxx"
    assert lengths[0] == len(writer.tokenizer("x\n<u>more\n<a>").input_ids)


def test_a_template_that_changes_the_past_is_read_anew(make_folder, monkeypatch) -> None:
    writer = Writer(make_folder(FORGETFUL), max_new_tokens=3)
    "".join(writer.answer("hello"))
    lengths = tokens_read(writer, monkeypatch)
    second = "".join(writer.answer("more"))
    whole = writer.tokenizer.apply_chat_template(writer.messages[:3], add_generation_prompt=True, tokenize=False)
    assert lengths[0] == len(writer.tokenizer(whole).input_ids)
    assert "".join(writer.text(whole)) == second


def test_the_report_has_speed_and_the_states_bytes(talker) -> None:
    writer = Writer(talker, max_new_tokens=40)
    sizes = set()
    for prompt in ("a" * 20, "b" * 60):
        list(writer.text(prompt))
        found = re.fullmatch(
            r"(\d+) tokens: the first after [\d.]+ s, then [\d,.]+ tokens/s; state (.+)", writer.report()
        )
        assert found is not None, writer.report()
        assert int(found[1]) <= 40
        sizes.add(found[2])
    assert len(sizes) == 1  # the state is of fixed size
    one = Writer(talker, max_new_tokens=1)
    list(one.text("a"))
    assert re.match(r"1 token: the first after [\d.]+ s; state", one.report())


def test_who_leaves_early_stops_the_writing(talker) -> None:
    writer = Writer(talker, max_new_tokens=100_000)
    pieces = writer.text("a b c d")
    next(pieces)
    pieces.close()
    assert writer._cache.get_seq_length() < 5_000


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["generate", *arguments])
    return int(stopped.value.code or 0)


def test_the_command_streams_to_stdout_and_reports_on_stderr(talker, capsys) -> None:
    assert run(str(talker), "Once", "--max-new-tokens", "4") == 0
    captured = capsys.readouterr()
    assert captured.out == "".join(Writer(talker, max_new_tokens=4).text("Once")) + "\n"
    assert "; state " in captured.err


def test_chat_reads_lines(talker, capsys, monkeypatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("\nsecond\n"))
    assert run(str(talker), "first", "--chat", "--max-new-tokens", "4") == 0
    captured = capsys.readouterr()
    writer = Writer(talker, max_new_tokens=4)
    expected = [("".join(writer.answer(message))) for message in ("first", "second")]
    assert captured.out == "".join(f"{text}\n" for text in expected)
    assert captured.err.count("; state ") == 2


def test_ctrl_c_ends_a_conversation(talker, capsys, monkeypatch) -> None:
    class Interrupted(io.StringIO):
        def readline(self, *_: object) -> str:
            raise KeyboardInterrupt

    monkeypatch.setattr("sys.stdin", Interrupted())
    assert run(str(talker), "--chat") == 130


def test_mistakes_are_one_paragraph(talker, make_folder, capsys) -> None:
    for arguments, words in (
        ([str(talker)], "Give a prompt"),
        ([str(talker), ""], "no token"),
        ([str(make_folder()), "hi", "--chat"], "has no chat template"),
        ([str(make_folder("{{ raise_exception('no such role') }}")), "hi", "--chat"], "refuses the conversation"),
    ):
        capsys.readouterr()
        assert run(*arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert words in error
    with pytest.raises(LinearizeError, match="There is no model"):
        Writer(talker / "nowhere")
