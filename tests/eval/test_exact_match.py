import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from linearize.errors import LinearizeError
from linearize.eval.exact_match import (
    WORDS,
    continuations,
    first_line,
    gsm8k_task,
    last_number,
    made_tasks,
    match,
)


@pytest.fixture
def tokenizer(make_teacher):
    return AutoTokenizer.from_pretrained(make_teacher())


class Scripted(nn.Module):
    """Answers each prompt by a function of its text."""

    def __init__(self, tokenizer, answer):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.tokenizer, self.answer, self.calls = tokenizer, answer, []

    def generate(self, input_ids, attention_mask, max_new_tokens, **_):
        self.calls.append(len(input_ids))
        prompts = [ids[mask.bool()] for ids, mask in zip(input_ids, attention_mask, strict=True)]
        answers = [self.tokenizer.encode(self.answer(self.tokenizer.decode(ids)))[:max_new_tokens] for ids in prompts]
        longest = max(map(len, answers))
        padded = torch.tensor([[*ids, *[self.tokenizer.pad_token_id] * (longest - len(ids))] for ids in answers])
        return torch.cat([input_ids, padded], 1)


def solve(text: str) -> str:
    """What a model that understands the made tasks writes."""
    question = text.rpartition("\n\n")[2]
    last = question.splitlines()[-1]
    if last.startswith("Item number"):
        place = last.split()[2]
        return next(f" {line.split()[1]}\nnext" for line in question.splitlines() if line.startswith(f"{place}. "))
    words = question.splitlines()[0].removeprefix("Words: ").split()
    return " " + " ".join(words if "same" in last else reversed(words)) + ".\n\nWords: more"


def test_a_model_that_solves_the_tasks_matches_all_and_another_none(tokenizer) -> None:
    for task in made_tasks(samples=7, seed=3):
        model = Scripted(tokenizer, solve)
        score = match(model, tokenizer, task, batch=3)
        assert (score.task, score.accuracy, score.high, score.samples) == (task.name, 1.0, 1.0, 7)
        assert 0.6 < score.low < 0.7
        assert model.calls == [3, 3, 1]
        assert match(Scripted(tokenizer, lambda text: " apple apple"), tokenizer, task).accuracy == 0


def test_half_right_is_one_half(tokenizer) -> None:
    (copy, *_) = made_tasks(samples=8, seed=0)
    right = {prompt.text for prompt in copy.prompts[::2]}
    model = Scripted(tokenizer, lambda text: solve(text) if text in right else "no")
    score = match(model, tokenizer, copy)
    assert score.accuracy == 0.5
    assert score.low < 0.3 < 0.7 < score.high


def test_prompts_are_solved_examples_and_depend_on_the_seed() -> None:
    first, again, other = made_tasks(3, seed=0), made_tasks(3, seed=0), made_tasks(3, seed=1)
    assert [task.prompts for task in first] == [task.prompts for task in again]
    assert not {prompt.text for task in first for prompt in task.prompts} & {
        prompt.text for task in other for prompt in task.prompts
    }
    for task in first:
        for prompt in task.prompts:
            *solved, question = prompt.text.split("\n\n")
            assert len(solved) == 2
            assert set(prompt.answer.split()) <= set(WORDS)
            for example in solved:
                asked, _, answer = example.rpartition(":")
                assert first_line(solve(f"{asked}:")) == answer.strip()
            assert first_line(solve(question)) == prompt.answer


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (" 3 + 4 = 7\n#### 7", "7"),
        (" She has 1,250 left. #### 1,250.00\n\nQuestion: 9?", "1250"),
        (" so 2 times 5 makes 10 apples.\n\nQuestion: how many of 99?", "10"),
        ("#### -3.50", "-3.5"),
        (" none at all", ""),
    ],
)
def test_the_last_number_of_an_answer(text: str, number: str) -> None:
    assert last_number(text) == number


def test_gsm8k_shows_its_first_rows_and_asks_the_others(tmp_path, tokenizer) -> None:
    rows = [{"question": f"What is {n} and 1?", "answer": f"{n}+1 is it.\n#### {n + 1}"} for n in range(9)]
    (tmp_path / "gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = gsm8k_task(tmp_path, samples=3)
    assert [prompt.answer for prompt in task.prompts] == ["6", "7", "8"]
    assert task.prompts[0].text.count("Question:") == 6
    assert task.prompts[0].text.endswith("Question: What is 5 and 1?\nAnswer:")

    def count(text):
        return f" that makes {int(text.split()[-4]) + 1}.\n\nQuestion: What is 1000 and 1?"

    assert match(Scripted(tokenizer, count), tokenizer, task).accuracy == 1
    (tmp_path / "gsm8k.jsonl").write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(LinearizeError, match="is no GSM8K: expected more than 5 rows"):
        gsm8k_task(tmp_path, 3)


def test_prompts_of_any_length_are_continued_as_if_alone(make_teacher) -> None:
    folder = make_teacher("random", initializer_range=0.3)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    texts = ["a", "some longer text", "ten words"]
    together = continuations(model, tokenizer, texts, 9, "zz")
    assert together == [continuations(model, tokenizer, [text], 9, "zz")[0] for text in texts]
    assert len(set(together)) == 3
    stop = together[1][2]
    cut = continuations(model, tokenizer, texts, 9, stop)
    assert cut[1] == together[1][: together[1].lstrip().index(stop) + 1]
    assert all(text.startswith(short) for text, short in zip(together, cut, strict=True))
    assert not model.training
    ends = SimpleNamespace(
        pad_token_id=None, eos_token_id=5, encode=lambda text, verbose: [7, 5], decode=lambda ids, **_: ""
    )
    seen = {}

    def generate(input_ids, **_):
        seen["ids"] = input_ids.tolist()
        return input_ids

    model.generate = generate
    continuations(model, ends, ["x"], 2, "zz")
    assert seen["ids"] == [[7]]  # an end-of-text token behind the prompt would end the answer before it began
