import re

import pytest
from huggingface_hub import ModelCard

from linearize.report import model_card


def test_the_metadata_names_base_model_and_licence(results):
    card = ModelCard(model_card(results, base_model="some/teacher", license="apache-2.0"))
    assert card.data.base_model == "some/teacher"
    assert card.data.to_dict()["base_model_relation"] == "finetune"
    assert card.data.library_name == "transformers"
    assert card.data.license == "apache-2.0"
    assert {"linearize", "recipe:liger"} <= set(card.data.tags)


def test_a_teacher_without_hub_id_or_licence_claims_none(results):
    data = ModelCard(model_card(results)).data.to_dict()
    assert not {"base_model", "base_model_relation", "license"} & set(data)


def test_the_card_has_table_samples_loading_and_recipe(results):
    text = model_card(results, base_model="some/teacher")
    assert text.count("# teacher-liger") == 1
    assert "| after <finetune> | 14.81 |" in text
    assert "trust_remote_code=True" in text
    assert "linearize.load(" in text
    assert "````\n upon ``` & more\n````" in text
    assert "name: liger" in text


@pytest.mark.parametrize("key", ["rows", "cache", "samples", "recipe_yaml"])
def test_what_was_not_measured_is_not_there(results, key):
    title = {"rows": "Quality", "cache": "Memory", "samples": "Sample", "recipe_yaml": "Recipe"}[key]
    assert f"## {title}" in model_card(results)
    del results[key]
    assert f"## {title}" not in model_card(results)


def test_without_results_there_is_no_number():
    text = model_card({"model": "teacher", "recipe": "liger"}).split("---", 2)[2]
    without_code = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    assert not re.search(r"\d", without_code)
