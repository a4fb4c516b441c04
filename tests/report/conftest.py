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
        "provenance": {
            "linearize": "0.1.0",
            "commit": None,
            "packages": {"torch": "2.13.0"},
            "seed": 0,
            "device": "some CPU, 2 threads",
            "dtype": "float32",
            "seconds": 3725.0,
            "teacher": {
                "source": "hub:some/teacher@main",
                "revision": "abc",
                "base_model": "some/teacher",
                "license": "apache-2.0",
            },
            "data": {"description": "owner/text: 9 training rows", "datasets": ["owner/text"]},
        },
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


@pytest.fixture
def evaluation():
    def text(loss):
        spans = [(1, 64), (64, 128), (128, 256)]
        parts = [
            {"start": a, "stop": b, "tokens": 9, "loss": loss + 0.1 * i, "kl": 0.1} for i, (a, b) in enumerate(spans)
        ]
        return {
            "loss": loss,
            "kl": loss / 10,
            "top1": 0.5,
            "by_position": parts,
            "row_losses": [[10, loss], [30, loss]],
        }

    def recall(accuracy):
        depths = [{"start": i / 5, "stop": (i + 1) / 5, "samples": 4, "accuracy": accuracy} for i in range(5)]
        return [
            {"task": "passkey", "length": n, "accuracy": accuracy, "low": 0.2, "high": 0.9, "by_depth": list(depths)}
            for n in (512, 1024)
        ]

    def speed(seconds):
        full = {"first_token": seconds, "prefill": 1e4, "decode": 50.0, "cache_bytes": 2**20, "peak_bytes": 2**30}
        empty = dict.fromkeys(full)
        return [
            {"context": 1024, "batch": 1, "note": "", **full},
            {"context": 65536, "batch": 1, "note": "out of memory", **empty},
        ]

    models = [
        {"name": "teacher", "role": "teacher", "text": {"book": text(2.0)}, "recall": recall(1.0), "speed": speed(0.5)},
        {
            "name": "mine",
            "role": "student",
            "text": {"book": text(2.5)},
            "recall": recall(0.6),
            "speed": speed(0.2),
            "zero_shot": [{"task": "hellaswag", "metric": "acc_norm", "score": 0.412, "stderr": 0.005}],
        },
        {"name": "memory zeroed", "role": "control", "text": {"book": text(2.6)}, "recall": recall(0.1)},
        {"name": "softmax", "role": "control", "text": {"book": text(2.2)}, "trained": True, "recipe": "c/s"},
    ]
    return {
        "name": "mine",
        "model": "some/teacher",
        "recipe": "liger",
        "suite": {"name": "quick"},
        "texts": [{"name": "book", "source": "owner/books"}],
        "models": models,
        "provenance": {"dtype": "float32", "device": "some CPU", "seed": 0, "seconds": 9.0},
        "window": 64,
        "trained_length": 128,
        "cache": [{"context": 8192, "teacher_bytes": 1000, "student_bytes": 55}],
        "differences": [
            {"name": "memory zeroed", "text": {"book": {"nats": 0.1, "stderr": 0.01}}, "answers": {"passkey 512": 0.5}},
            {"name": "softmax", "text": {"book": {"nats": -0.3, "stderr": 0.02}}, "answers": {}},
        ],
    }
