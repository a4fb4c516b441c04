"""`README.md` of a checkpoint: the model card that the Hugging Face Hub shows. Every number in it was measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from linearize.report.evaluation import evaluation_cells, speed_cells, verdicts
from linearize.report.table import Results, cache_cells, duration, final_row, markdown_table, quality_cells

LOADING = """## How to load it

With transformers alone (the checkpoint brings its own modeling code):

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{place}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{place}", trust_remote_code=True)
inputs = tokenizer("The capital of France is", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0]))
```
"""
WITH_LINEARIZE = """With `linearize` installed, which runs no code of the checkpoint and has kernels for GPUs:

```python
import linearize

model = linearize.load("{place}")
```
"""
PLAIN = "\n".join(line for line in LOADING.replace(", trust_remote_code=True", "").splitlines() if "alone" not in line)
FILLING = """inputs = tokenizer(f"The capital of France is {{tokenizer.mask_token}}.", return_tensors="pt")
print(tokenizer.decode(model(**inputs).logits[inputs["input_ids"] == tokenizer.mask_token_id].argmax(-1)))
```
"""

FIGURES = {
    "figures/quality.png": "Held-out perplexity and divergence of every row of the table.",
    "figures/transfer.png": "Attention transfer: each layer's loss against the teacher's attention output; every "
    "step reads other text, which with few steps moves it more than training does.",
    "figures/loss.png": "The loss that each stage minimises; stages do not share a unit.",
    "eval/perplexity.png": "Perplexity by position in the document.",
    "eval/recall.png": "Recall by length and depth.",
    "eval/cost.png": "Time, speed and memory against context.",
}


def model_card(results: Results, evaluation: Results | None = None, figures: Sequence[str] = ()) -> str:
    """Return the model card as Markdown with YAML metadata.

    Args:
        results: what `results.json` holds; sections whose keys are absent are left out.
        evaluation: what `eval.json` holds; None where the model was not evaluated beyond its run.
        figures: names of the pictures that lie beside the card, of those in `FIGURES`.
    """
    recipe, model = str(results.get("recipe", "")), str(results.get("model", "a Transformer"))
    base_model, license = teacher_of(results).get("base_model"), teacher_of(results).get("license")
    name = f"{model.rstrip('/').rsplit('/', 1)[-1]}-{recipe.replace('/', '-')}" if recipe else model
    data = ModelCardData(
        base_model=base_model,
        base_model_relation="finetune" if base_model else None,
        datasets=data_of(results).get("datasets") or None,
        library_name="transformers",
        pipeline_tag="text-generation" if is_decoder(results) else "fill-mask",
        license=license,
        tags=[tag for tag in ("linearize", *attention_tags(results), f"recipe:{recipe}" if recipe else "") if tag],
        model_name=name,
        eval_results=eval_results(results, evaluation) or None,
    )
    pictures = {place: f"![{words}]({place})" for place, words in FIGURES.items() if place in figures}
    origin = f"[{base_model}](https://huggingface.co/{base_model})" if base_model else f"`{model}`"
    source = str(teacher_of(results).get("source", ""))
    if source.endswith(".gguf"):
        origin += f" (weights dequantized from `{source.rsplit('/', 1)[-1]}`)"
    done = (
        f"its softmax attention replaced by `linearize` with the recipe `{recipe}`. The shape of the new attention and "
        "the stages that recovered the quality"
        if is_converted(results)
        else f"trained by `linearize` with the recipe `{recipe}`, a control that keeps softmax attention. The stages"
    )
    parts = [
        f"# {name}",
        f"{origin}, {done} are in `recipe.lock.yaml`; curves and figures are in `report.html`.",
        loading_part(results, name),
        quality_part(results),
        pictures.get("figures/quality.png", ""),
        evaluation_part(evaluation, [text for place, text in pictures.items() if place.startswith("eval/")]),
        cache_part(results),
        sample_part(results),
        training_part(results),
        *(text for place, text in pictures.items() if place in ("figures/transfer.png", "figures/loss.png")),
        recipe_part(results),
        limits_part(results, evaluation),
    ]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(part for part in parts if part) + "\n"))


def teacher_of(results: Results) -> Results:
    """Return what is known of the teacher."""
    return dict(results.get("provenance", {}).get("teacher") or {})


def data_of(results: Results) -> Results:
    """Return what is known of the training data."""
    return dict(results.get("provenance", {}).get("data") or {})


def is_converted(results: Results) -> bool:
    """Tell whether attention was replaced, which the softmax control's is not."""
    return bool(results.get("converted", True))


def is_decoder(results: Results) -> bool:
    """Tell whether the model continues text, and fills no masks."""
    return bool(results.get("causal", True))


def attention_tags(results: Results) -> Sequence[str]:
    """Return the tags of the new attention."""
    return ("linear-attention", "hybrid") if is_converted(results) else ()


def eval_results(results: Results, evaluation: Results | None) -> list[EvalResult]:
    """Return every measured number of the finished model as an entry of `model-index`."""
    found: list[EvalResult] = []
    last, task = final_row(results) or {}, "text-generation" if is_decoder(results) else "fill-mask"
    names = data_of(results).get("datasets") or []
    place = {"dataset_type": names[0] if names else "held-out", "dataset_name": "held-out rows of the training data"}
    found += quality_results(last, task, place)
    student: Results = {}
    if evaluation is not None:
        student = next(model for model in evaluation["models"] if model["role"] == "student")
    for text in (evaluation or {}).get("texts", ()):
        place = {"dataset_type": str(text["source"]), "dataset_name": str(text["name"])}
        measured = student["text"].get(text["name"])
        if measured is not None and text["name"] != "held-out":  # the run's own rows stand above
            found += quality_results(measured, task, place)
    for row in (*student.get("recall", ()), *student.get("generation", ())):
        title = f"{row['task']} ({row['length']} tokens)" if "length" in row else str(row["task"])
        found.append(entry("text-generation", str(row["task"]), title, "exact_match", row["accuracy"]))
    for row in student.get("zero_shot", ()):
        found.append(entry("text-generation", str(row["task"]), str(row["task"]), str(row["metric"]), row["score"]))
    return found


def quality_results(row: Results, task: str, place: dict[str, str]) -> list[EvalResult]:
    """Return perplexity and what compares with the teacher, as far as they were measured and are finite."""
    measures = {
        "perplexity": "Perplexity",
        "kl": "KL divergence from the teacher (nats a token)",
        "top1": "Share of tokens with the teacher's top token",
    }
    values = {key: row.get(key) for key in measures}
    return [
        entry(task, place["dataset_type"], place["dataset_name"], key, value, measures[key])
        for key, value in values.items()
        if value is not None and math.isfinite(value)
    ]


def entry(
    task: str, dataset: str, dataset_name: str, metric: str, value: float, metric_name: str | None = None
) -> EvalResult:
    """Return one entry of `model-index`, its number with six digits."""
    return EvalResult(
        task_type=task,
        dataset_type=dataset,
        dataset_name=dataset_name,
        metric_type=metric,
        metric_name=metric_name,
        metric_value=float(f"{value:.6g}"),
    )


def loading_part(results: Results, name: str) -> str:
    """Return the section on loading."""
    if not is_converted(results):
        return PLAIN.format(place=name).strip()
    text = f"{LOADING}\n{WITH_LINEARIZE}"
    if not is_decoder(results):
        head, _, tail = text.replace("AutoModelForCausalLM", "AutoModelForMaskedLM").partition("inputs = ")
        text = head + FILLING + tail.partition("```\n")[2]
    return text.format(place=name).strip()


def quality_part(results: Results) -> str:
    """Return the section with the quality table."""
    cells = quality_cells(results)
    return (
        f"## Quality\n\nOn held-out text, all rows on the same tokens:\n\n{markdown_table(cells)}" if cells.rows else ""
    )


def evaluation_part(evaluation: Results | None, pictures: Sequence[str]) -> str:
    """Return the section with what `linearize eval` measured, teacher and controls beside the model."""
    if evaluation is None:
        return ""
    about = evaluation["provenance"]
    parts = [
        f"## Evaluation\n\nSuite `{evaluation['suite']['name']}` of `linearize eval`, {about['dtype']} on "
        f"{about['device']}, seed {about['seed']}; `eval/eval.json` has the rest.",
        " ".join(verdicts(evaluation)),
        markdown_table(evaluation_cells(evaluation)),
    ]
    speed = speed_cells(evaluation)
    if speed.rows:
        parts.append(f"Speed and memory, eager mode, the same loop for all:\n\n{markdown_table(speed)}")
    return "\n\n".join(part for part in (*parts, *pictures) if part)


def cache_part(results: Results) -> str:
    """Return the section with the cache table."""
    if not results.get("cache"):
        return ""
    return f"## Memory\n\nCache of one sequence while it generates:\n\n{markdown_table(cache_cells(results))}"


def sample_part(results: Results) -> str:
    """Return the section with the continuations of one prompt."""
    sample = results.get("samples")
    if not sample:
        return ""
    pieces = [f"**{who.capitalize()}:**\n\n{fenced(sample[who])}" for who in ("teacher", "student") if who in sample]
    return f"## Sample\n\nGreedy continuations of:\n\n{fenced(sample['prompt'])}\n\n" + "\n\n".join(pieces)


def training_part(results: Results) -> str:
    """Return the section on data, hardware, time and versions."""
    known = results.get("provenance", {})
    teacher, data = teacher_of(results), data_of(results)
    packages = ", ".join(f"{name} {version}" for name, version in known.get("packages", {}).items())
    revision = f", revision `{teacher['revision']}`" if teacher.get("revision") else ""
    commit = f", commit `{known['commit']}`" if known.get("commit") else ""
    lines = [
        f"* Teacher: `{teacher['source']}`{revision}" if teacher.get("source") else "",
        f"* Data: {data['description']}" if data.get("description") else "",
        f"* Hardware: {known['device']}, {known.get('dtype', '')}".rstrip(", ") if known.get("device") else "",
        spent(results),
        f"* Software: linearize {known['linearize']}{commit}; {packages}" if known.get("linearize") else "",
    ]
    kept = "\n".join(line for line in lines if line)
    return f"## Training\n\n{kept}" if kept else ""


def spent(results: Results) -> str:
    """Return the line on time: of the one session that the run took, or else of its training alone."""
    seconds = results.get("provenance", {}).get("seconds")
    if seconds is None:
        return ""
    trained = (final_row(results) or {}).get("seconds") or 0.0
    if trained > seconds:
        return f"* Time: {duration(trained)} of training; the run was stopped and went on"
    return f"* Time: {duration(seconds)}, evaluation included"


def limits_part(results: Results, evaluation: Results | None) -> str:
    """Return the section on limits: what was not measured, and what is inherited."""
    student: dict[str, Any] = {}
    if evaluation is not None:
        student = next(model for model in evaluation["models"] if model["role"] == "student")
    absent = {"recall": "recall over long contexts", "zero_shot": "knowledge and reasoning"}
    missing = [words for key, words in absent.items() if not student.get(key)] + ["instruction following and safety"]
    lines = [
        f"* The numbers above are all that was measured. Not measured: {', '.join(missing)}.",
        "* A state of fixed size cannot recall everything: expect losses on long-range retrieval, which perplexity "
        "hardly shows."
        if is_converted(results)
        else "",
        "* It inherits the teacher's knowledge, biases and licence; the data that trained it has terms of its own.",
    ]
    return "## Limits\n\n" + "\n".join(line for line in lines if line)


def recipe_part(results: Results) -> str:
    """Return the section with the recipe as it ran."""
    text = results.get("recipe_yaml")
    return f"## Recipe\n\n{fenced(text.strip(), 'yaml')}" if text else ""


def fenced(text: str, language: str = "") -> str:
    """Return text as a code block that nothing in it can end."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text}\n{fence}"
