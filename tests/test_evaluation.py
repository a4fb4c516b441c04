"""`linearize eval` and `linearize compare` on a tiny teacher, from the command line to the files that they leave."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from linearize import cli, evaluation
from linearize.api import linearize
from linearize.errors import LinearizeError
from linearize.evaluation import compare, evaluate_folder

QUICK = ["--rows", "3", "--samples", "2", "--lengths", "200", "--recall", "passkey"]


def make_run(teacher: Path, recipe: str, output: Path, *overrides: str) -> Path:
    words = ["data.length=128", "data.held_out=6", *overrides]
    return linearize(teacher, recipe, output, quick=True, tokens=512, overrides=words).output


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, save_teacher) -> dict[str, Path]:
    """A student, one whose memory is idle, a trained softmax control and a window-only one."""
    place = tmp_path_factory.mktemp("runs")
    teacher = save_teacher(place / "base")
    window = "mixer.window.size=16"
    idle = "mixer.combine={name: learned, window: 1.0, memory: 0.0}"
    made = {
        "liger": make_run(teacher, "liger", place / "liger", window),
        "idle": make_run(teacher, "liger", place / "idle", window, idle, "stages=[]"),
        "softmax": make_run(teacher, "control/softmax-lora", place / "softmax"),
        "window": make_run(teacher, "control/window-only", place / "window", window),
    }
    return {"teacher": teacher, **made}


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(word) for word in words])
    return int(stopped.value.code or 0)


def by_name(results: dict) -> dict[str, dict]:
    return {model["name"]: model for model in results["models"]}


def test_one_command_measures_teacher_student_and_controls(runs, tmp_path, capsys) -> None:
    out = tmp_path / "report"
    words = [runs["liger"], *QUICK, "--control", runs["softmax"], "--control", runs["window"], "--output", out]
    assert run("eval", *words, "--contexts", "32") == 0
    printed = capsys.readouterr().out
    results = json.loads((out / "eval.json").read_text())
    names = ["teacher", "liger", "memory zeroed", "window only", "memory only", "no mixer", "softmax", "window"]
    assert [model["name"] for model in results["models"]] == names
    for name in names:
        assert name in printed
    models = by_name(results)
    text = {name: model["text"]["held-out"] for name, model in models.items()}
    assert len({row["eval_tokens"] for row in text.values()}) == 1
    assert text["teacher"]["kl"] == 0
    assert all(row["kl"] > 0 for name, row in text.items() if name != "teacher")
    answered = [name for name, model in models.items() if model.get("recall")]
    assert answered == ["teacher", "liger", "memory zeroed", "softmax", "window"]
    assert [row["task"] for row in models["liger"]["generation"]] == ["copy", "reversal", "list"]
    assert [name for name, model in models.items() if model.get("speed")] == ["teacher", "liger"]
    assert models["softmax"]["recipe"] == "control/softmax-lora"
    for entry in results["differences"]:
        own, other = models["liger"]["text"]["held-out"], models[entry["name"]]["text"]["held-out"]
        assert entry["text"]["held-out"]["nats"] == pytest.approx(other["loss"] - own["loss"])
        assert entry["text"]["held-out"]["stderr"] > 0
    provenance = results["provenance"]
    assert {"torch", "transformers"} <= provenance["packages"].keys()
    assert (provenance["dtype"], provenance["batch_tokens"], provenance["seed"]) == ("float32", 4096, 0)
    assert results["texts"][0]["rows"] == 3
    assert len(results["texts"][0]["sha256"]) == 64
    page = (out / "eval.md").read_text()
    for figure in ("perplexity", "recall", "cost"):
        assert (out / f"{figure}.png").read_bytes()[:4] == b"\x89PNG"
        assert f"({figure}.png)" in page
    assert "Memory: zeroing it" in page
    assert "Memory: zeroing it" in " ".join(printed.split())


def test_an_evaluation_that_was_stopped_goes_on(runs, tmp_path) -> None:
    """Its answers are those of one that was not, none is measured twice, and nothing of the other setting is used."""
    options = {"rows": 3, "samples": 2, "lengths": "200,240", "recall": "passkey", "controls": [runs["window"]]}
    whole = evaluate_folder(runs["liger"], **options, output=tmp_path / "whole")
    assert not (tmp_path / "whole" / "unfinished.json").exists()
    out, told = tmp_path / "out", []

    def stop_at(part: str):
        def tell(words: str) -> None:
            told.append(words)
            if words == part:
                raise KeyboardInterrupt

        return tell

    for part in ("teacher: reversal", "window: passkey at 240 tokens"):
        with pytest.raises(KeyboardInterrupt):
            evaluate_folder(runs["liger"], **options, output=out, watch=stop_at(part))
        assert (out / "unfinished.json").is_file() and not (out / "eval.json").exists()
    results = evaluate_folder(runs["liger"], **options, output=out, watch=told.append)
    for model, same in zip(results["models"], whole["models"], strict=True):
        assert [model.get(key) for key in ("recall", "generation")] == [same.get(k) for k in ("recall", "generation")]
        assert model["text"]["held-out"]["loss"] == same["text"]["held-out"]["loss"]
    assert any(words.startswith("going on: ") for words in told)
    begun = [words for words in told if "passkey" in words or "reversal" in words]
    again = {"teacher: reversal", "window: passkey at 240 tokens"}  # which were stopped
    assert len(set(begun)) == 3 * 4  # of teacher, student, memory zeroed and control
    assert sorted(begun) == sorted([*set(begun), *again])
    assert not (out / "unfinished.json").exists()
    with pytest.raises(KeyboardInterrupt):
        evaluate_folder(runs["liger"], **options, output=out, watch=stop_at("liger: copy"))
    told.clear()
    evaluate_folder(runs["liger"], **options, seed=1, output=out, watch=told.append)
    assert not any(words.startswith("going on: ") for words in told)


def test_an_idle_memory_is_seen_at_a_glance(runs, tmp_path, capsys) -> None:
    assert run("eval", runs["idle"], *QUICK, "--output", tmp_path / "a") == 0
    assert "IT DOES NOTHING MEASURABLE" in " ".join(capsys.readouterr().out.split())
    results = json.loads((tmp_path / "a" / "eval.json").read_text())
    zeroed = next(entry for entry in results["differences"] if entry["name"] == "memory zeroed")
    assert abs(zeroed["text"]["held-out"]["nats"]) < 1e-6
    assert set(zeroed["answers"].values()) == {0.0}
    evaluate_folder(runs["window"], rows=2, samples=1, recall="none", output=tmp_path / "b")
    assert "has no memory" in (tmp_path / "b" / "eval.md").read_text()


def test_numbers_are_those_of_the_run(runs, tmp_path) -> None:
    before = json.loads((runs["liger"] / "results.json").read_text())["rows"]
    found = by_name(evaluate_folder(runs["liger"], recall="none", samples=1, output=tmp_path / "out"))
    for row, name in ((before[0], "teacher"), (before[-1], "liger")):
        assert found[name]["text"]["held-out"]["perplexity"] == pytest.approx(row["perplexity"], rel=1e-5)
    assert found["liger"]["text"]["held-out"]["kl"] == pytest.approx(before[-1]["kl"], rel=1e-3)


def test_batch_and_seed_are_settings_and_the_batch_changes_no_result(runs, tmp_path) -> None:
    options = {"rows": 4, "samples": 2, "lengths": "200", "recall": "passkey", "against": "none"}
    first, other, seeded = (
        evaluate_folder(runs["liger"], **options, batch_tokens=tokens, seed=seed, output=tmp_path / f"{tokens}{seed}")
        for tokens, seed in ((128, 0), (512, 0), (512, 1))
    )
    own, again = (by_name(results)["liger"] for results in (first, other))
    assert own["text"]["held-out"]["loss"] == pytest.approx(again["text"]["held-out"]["loss"], rel=1e-6)
    assert own["recall"][0]["log_prob"] == pytest.approx(again["recall"][0]["log_prob"], rel=1e-5)
    assert own["recall"][0]["log_prob"] != pytest.approx(by_name(seeded)["liger"]["recall"][0]["log_prob"], rel=1e-5)
    assert own["generation"] == again["generation"]
    assert "teacher" not in by_name(first)
    assert "kl" not in own["text"]["held-out"]


def test_long_rows_of_a_file_show_positions_past_the_trained_length(runs, tmp_path) -> None:
    (tmp_path / "long.txt").write_text("The grass is green and the sky is blue. " * 60)
    with pytest.warns(UserWarning, match="beyond the context of 256"):
        results = evaluate_folder(
            runs["liger"],
            data=str(tmp_path / "long.txt"),
            length=1024,
            rows=2,
            recall="none",
            samples=1,
            output=tmp_path,
        )
    spans = by_name(results)["liger"]["text"]["long"]["by_position"]
    assert [span["stop"] for span in spans] == [64, 128, 256, 512, 1024]
    assert (results["window"], results["trained_length"]) == (16, 128)
    assert "512–1,023" in (tmp_path / "eval.md").read_text()


def test_runs_stand_side_by_side(runs, tmp_path, capsys) -> None:
    for name in ("liger", "window", "idle"):
        assert run("eval", runs[name], *QUICK) == 0
    capsys.readouterr()
    table = tmp_path / "table.json"
    assert run("compare", runs["liger"], runs["window"], runs["idle"] / "eval" / "eval.json", "--output", table) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("teacher", "liger", "window", "idle"))
    content = json.loads(table.read_text())
    rows = {row.pop("measure"): row for row in content["rows"]}
    losses = [
        by_name(json.loads((runs[name] / "eval" / "eval.json").read_text()))[name]["text"]["held-out"]["loss"]
        for name in ("liger", "window")
    ]
    assert rows["held-out: perplexity"]["window"] == f"{math.exp(losses[1]):.1f}"
    behind = rows["held-out: loss behind liger (nats)"]
    assert behind["window"].startswith(f"{losses[1] - losses[0]:+.4f} ± ")
    assert (behind["liger"], behind["teacher"]) == ("0", "–")
    zeroed = rows["held-out: what zeroing the memory costs (nats)"]
    assert (zeroed["window"], zeroed["idle"][1:7]) == ("–", "0.0000")
    assert rows["cache at 8,192 tokens, share of the teacher's"]["teacher"] == "100.0 %"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--suite", "quik"], "Did you mean 'quick'"),
        (["--rows", "7"], "--rows 7 is more than the run held out"),
        (["--length", "256"], "--length 256 is more than the run held out"),
        (["--control", "{liger}"], "names a folder twice"),
        (["--control", "{place}"], "there is no model in"),
        (["--task-data", "{place}/none"], "there is no folder"),
        (["--task-data", "{place}"], "would not be read"),
        (["--against", "{other}"], "its tokenizer is another"),
        (["--data", "{place}/a.txt", "--data", "{place}/b/a.txt"], "names texts alike"),
        (["--dtype", "int8"], "'int8'"),
        (["--seed", "-1"], "--seed is -1"),
    ],
)
def test_what_cannot_be_measured_is_refused(words, message, runs, tmp_path, capsys, save_teacher) -> None:
    (tmp_path / "b").mkdir()
    for place in (tmp_path, tmp_path / "b"):
        (place / "a.txt").write_text("The grass is green. " * 40)
    other = save_teacher(tmp_path / "other") if "{other}" in words else ""
    if other:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(other)
        tokenizer.add_tokens(["linearize"])
        tokenizer.save_pretrained(other)
    filled = [word.format(liger=runs["liger"], place=tmp_path, other=other) for word in words]
    assert run("eval", runs["liger"], "--samples", "1", "--output", tmp_path / "out", *filled) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["a.txt", "a.txt/below"])
def test_a_report_that_cannot_be_written_is_found_before_anything_loads(place, runs, tmp_path, monkeypatch) -> None:
    (tmp_path / "a.txt").touch()
    monkeypatch.setattr("linearize.evaluation.load_teacher", None)
    with pytest.raises(LinearizeError, match=r"cannot be written: .*--output"):
        evaluate_folder(runs["liger"], output=tmp_path / place)


def test_a_backend_that_cannot_run_here_is_refused(runs, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("LINEARIZE_BACKEND", "triton")
    assert run("eval", runs["liger"], "--device", "cpu", "--output", tmp_path / "out") == 2
    assert capsys.readouterr().err.startswith("error: LINEARIZE_BACKEND='triton' needs a GPU")


@pytest.fixture(scope="module")
def others(runs, tmp_path_factory, save_teacher) -> dict[str, Path]:
    """Window-only controls that are not like for like, and one that is, of a copy of the teacher."""
    place = tmp_path_factory.mktemp("others")
    teacher, window = runs["teacher"], "mixer.window.size=16"
    copied = Path(shutil.copytree(teacher, place / "copied"))
    return {
        "teacher": make_run(save_teacher(place / "base", seed=1), "control/window-only", place / "seed", window),
        "length": make_run(teacher, "control/window-only", place / "length", window, "data.length=64"),
        "untrained": make_run(teacher, "control/window-only", place / "none", window, "data.length=64", "stages=[]"),
        "copied": make_run(copied, "control/window-only", place / "same", window),
    }


def test_a_control_of_another_teacher_or_other_documents_is_refused(runs, others, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(evaluation, "load_teacher", None)  # refused before anything is loaded
    (tmp_path / "a.txt").write_text("The grass is green. " * 40)
    text = str(tmp_path / "a.txt")
    for options in ({}, {"data": text}):
        with pytest.raises(LinearizeError, match="its teacher is another than the student's") as error:
            evaluate_folder(runs["liger"], controls=[others["teacher"]], output=tmp_path / "out", **options)
        assert "sha256" in str(error.value)
    with pytest.raises(LinearizeError, match=r"may have been trained on .*: data.length is 128 and 64\. .* --data"):
        evaluate_folder(runs["liger"], controls=[others["length"]], output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_control_that_is_like_for_like_is_measured(runs, others, tmp_path) -> None:
    (tmp_path / "a.txt").write_text("The grass is green. " * 40)
    sizes = {"rows": 1, "recall": "none", "against": "none", "generation": False}
    for name, data in (("copied", None), ("untrained", None), ("length", str(tmp_path / "a.txt"))):
        length = {"length": 64} if data else {}
        found = evaluate_folder(
            runs["liger"], controls=[others[name]], data=data, output=tmp_path / name, **sizes, **length
        )
        assert others[name].name in by_name(found)


def test_teachers_without_a_checksum_are_told_apart_by_source_and_revision(runs, tmp_path) -> None:
    """Large local folders have none; a folder is the same one however it is spelt."""

    def changed(name: str, model: str, revision: str | None) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        lock = yaml.safe_load((runs["window"] / "recipe.lock.yaml").read_text())
        lock["settings"]["model"] = model
        lock["provenance"]["teacher"] = {"source": model, "revision": revision, "sha256": {}}
        (folder / "recipe.lock.yaml").write_text(yaml.safe_dump(lock))
        return folder

    teacher = runs["teacher"]
    here = changed("here", str(teacher), None)
    evaluation._same_teacher(here, changed("spelt", str(teacher / ".." / teacher.name), None))
    evaluation._same_teacher(runs["liger"], here)
    first = changed("first", "owner/name", "a" * 40)
    for other in (changed("second", "owner/name", "b" * 40), changed("third", "owner/other", "a" * 40)):
        with pytest.raises(LinearizeError, match="its teacher is another"):
            evaluation._same_teacher(first, other)


def test_what_lies_behind_learned_positions_is_refused_before_anything_loads(
    tmp_path, save_teacher, monkeypatch
) -> None:
    teacher = save_teacher(tmp_path / "gpt2", "gpt2", max_position_embeddings=512)
    out = make_run(teacher, "control/window-only", tmp_path / "run", "mixer.window.size=16", "stages=[]")
    (tmp_path / "long.txt").write_text("The grass is green and the sky is blue. " * 60)
    fits = {"lengths": "512", "contexts": "479", "samples": 1, "recall": "passkey", "data": str(tmp_path / "long.txt")}
    found = evaluate_folder(out, **fits, length=512, rows=1, output=tmp_path / "fits")
    assert by_name(found)["run"]["recall"] and by_name(found)["run"]["generation"] and by_name(found)["run"]["speed"]
    monkeypatch.setattr(evaluation, "load_teacher", None)
    refused = (
        ({"lengths": "256,513"}, r"recall sample has 513 tokens .*\(--lengths 512 or less\)"),
        ({"contexts": "480"}, r"33 tokens beyond 480 \(--contexts 479 or less\)"),
        ({"length": 513}, r"'long' has documents of 513 tokens a row \(--length 512 or less\)"),
        ({"lengths": "513", "contexts": "64,480"}, r"--lengths 512 .*--contexts 479"),
    )
    for change, message in refused:
        with pytest.raises(LinearizeError, match=message):
            evaluate_folder(out, **{"length": 512, "rows": 1, **fits, **change}, output=tmp_path / "out")
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    row = {"question": "How many apples are left of seven?", "answer": "One of them is gone. #### 6"}
    (tasks / "gsm8k.jsonl").write_text("\n".join([json.dumps(row)] * 7))
    with pytest.raises(LinearizeError, match=r"gsm8k reads .* and writes 256 .*without gsm8k\.jsonl"):
        evaluate_folder(out, **fits, length=512, rows=1, task_data=tasks, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_control_is_evaluated_on_its_own_and_stands_beside_students(runs, tmp_path, capsys) -> None:
    for name in ("softmax", "liger"):
        assert run("eval", runs[name], *QUICK, "--output", tmp_path / name) == 0
    alone = by_name(json.loads((tmp_path / "softmax" / "eval.json").read_text()))
    assert list(alone) == ["teacher", "softmax"]
    capsys.readouterr()
    assert run("compare", tmp_path / "softmax" / "eval.json", tmp_path / "liger" / "eval.json") == 0
    printed = capsys.readouterr().out
    assert "softmax" in printed and "liger" in printed


def test_what_cannot_be_compared_is_refused(runs, tmp_path, capsys) -> None:
    with pytest.raises(LinearizeError, match="was not evaluated yet"):
        compare([tmp_path])
    for name, rows in (("a", 2), ("b", 3)):
        evaluate_folder(runs["liger"], rows=rows, recall="none", samples=1, against="none", output=tmp_path / name)
    with pytest.raises(LinearizeError, match=r"different rows of 'held-out' \(2 of 128 tokens, 3 of 128\)"):
        compare([tmp_path / "a", tmp_path / "b"])
    for wrong, words in ((tmp_path / "a" / "eval.json", "is one of the evaluations"), (tmp_path / "t", "end in .json")):
        assert run("compare", tmp_path / "a", "--output", wrong) == 2
        assert words in capsys.readouterr().err
    assert compare([tmp_path / "a"]) and not (tmp_path / "t").exists()
    (tmp_path / "c.json").write_text("[]")
    with pytest.raises(LinearizeError, match="is no evaluation"):
        compare([tmp_path / "c.json"])


def test_the_models_of_an_evaluation_are_let_go(runs, tmp_path) -> None:
    evaluate_folder(runs["liger"], rows=1, recall="none", samples=1, output=tmp_path / "out")
    import gc

    from transformers import PreTrainedModel

    gc.collect()
    assert not [held for held in gc.get_objects() if isinstance(held, PreTrainedModel)]
    assert torch.is_grad_enabled()
