import math

import pytest


@pytest.fixture
def results():
    def positions(kl):
        spans = [(1, 64), (64, 128), (128, 256)]
        return [{"start": a, "stop": b, "tokens": 10, "loss": 2.0, "kl": kl * a} for a, b in spans]

    return {
        "model": "some/teacher",
        "recipe": "liger",
        "rows": [
            {"name": "teacher", "perplexity": 12.345, "kl": 0.0, "top1": 1.0, "tokens": 0, "seconds": 0.0},
            {"name": "after surgery", "perplexity": 1.8e7, "kl": 0.91, "top1": 0.5, "by_position": positions(0.01)},
            {
                "name": "after <finetune>",
                "perplexity": 14.814,
                "kl": 0.1234567,
                "top1": 0.876,
                "tokens": 40960,
                "seconds": 432.4,
                "by_position": positions(0.001),
            },
            {"name": "memory zeroed", "perplexity": 20.5, "kl": 0.3, "control": True},
        ],
        "samples": {"prompt": "Once <b>", "teacher": " upon a time", "student": " upon ``` & more"},
        "cache": [
            {"context": 1024, "teacher_bytes": 45 * 2**20, "student_bytes": 9 * 2**20},
            {"context": 65536, "teacher_bytes": 2880 * 2**20, "student_bytes": 9 * 2**20},
        ],
        "provenance": {"versions": {"torch": "2.13.0"}, "seed": 0, "device": "cpu"},
        "recipe_yaml": "name: liger\npaper: https://example.org/a\n",
    }


@pytest.fixture
def records():
    made = []
    for step in range(1, 31):
        layers = {str(layer): math.exp(-step / 10) * (1 + layer) for layer in range(4)}
        made.append(
            {"stage": "transfer", "step": step, "loss": sum(layers.values()), "tokens": step * 64, "layers": layers}
        )
    for step in range(1, 21):
        made.append({"stage": "finetune", "step": step, "loss": 3 - step / 100, "tokens": step * 64})
    return made
