"""`README.md` of a checkpoint: the model card that the Hugging Face Hub shows. Every number in it was measured."""

from __future__ import annotations

from huggingface_hub import ModelCard, ModelCardData

from linearize.report.table import Results, cache_cells, markdown_table, quality_cells

LOADING = """## How to load it

With `linearize` installed:

```python
import linearize

model = linearize.load("{place}")
```

With transformers alone (the checkpoint brings its own modeling code):

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{place}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{place}")
inputs = tokenizer("The capital of France is", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0]))
```
"""
FILLING = """inputs = tokenizer(f"The capital of France is {{tokenizer.mask_token}}.", return_tensors="pt")
print(tokenizer.decode(model(**inputs).logits[inputs["input_ids"] == tokenizer.mask_token_id].argmax(-1)))
```
"""
LOADING_ENCODER = LOADING.replace("AutoModelForCausalLM", "AutoModelForMaskedLM").partition("inputs = ")[0] + FILLING

LIMITS = """## Limits

* The numbers above are all that was measured{where}: no recall over long contexts, knowledge or instruction following.
* It inherits the teacher's knowledge, biases and licence; the data that it was trained on has terms of its own.
"""


def model_card(results: Results, *, base_model: str | None = None, license: str | None = None) -> str:
    """Return the model card as Markdown with YAML metadata.

    Args:
        results: what `results.json` holds; sections whose keys are absent are left out.
        base_model: the teacher's hub id (`owner/name`); None where it has none.
        license: the teacher's licence, as its own card names it.
    """
    recipe, model = str(results.get("recipe", "")), str(results.get("model", "a Transformer"))
    data = ModelCardData(
        base_model=base_model,
        base_model_relation="finetune" if base_model else None,
        library_name="transformers",
        pipeline_tag="text-generation" if results.get("cache") else "fill-mask",
        license=license,
        tags=[tag for tag in ("linearize", "linear-attention", "hybrid", f"recipe:{recipe}" if recipe else "") if tag],
    )
    encoder = not results.get("cache")
    name = f"{model.rstrip('/').rsplit('/', 1)[-1]}-{recipe}" if recipe else model
    origin = f"[{base_model}](https://huggingface.co/{base_model})" if base_model else f"`{model}`"
    parts = [
        f"# {name}",
        f"{origin}, its softmax attention replaced by `linearize` with the recipe `{recipe}`. The shape of the new "
        "attention and the stages that recovered the quality are in `recipe.lock.yaml`; curves and figures are in "
        "`report.html`.",
        quality_part(results),
        cache_part(results),
        sample_part(results),
        (LOADING_ENCODER if encoder else LOADING).format(place=name).strip(),
        limits_part(results),
        recipe_part(results),
    ]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(part for part in parts if part) + "\n"))


def quality_part(results: Results) -> str:
    """Return the section with the quality table."""
    cells = quality_cells(results)
    return (
        f"## Quality\n\nOn held-out text, all rows on the same tokens:\n\n{markdown_table(cells)}" if cells.rows else ""
    )


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


def limits_part(results: Results) -> str:
    """Return the section on limits."""
    length = results.get("provenance", {}).get("eval_length")
    return LIMITS.format(where=f", on rows of {length} tokens" if length else "").strip()


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
