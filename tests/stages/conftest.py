"""Rows and runs on a tiny model, for the tests of all stages."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from linearize.data import Corpus, PackedRows
from linearize.recipe_mixer import Mixer
from linearize.stages import Run
from linearize.surgery import convert


@pytest.fixture
def corpus() -> Corpus:
    """Eight rows of two documents each."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 61, (8, 48), generator=generator, dtype=torch.int32)
    positions = torch.cat([torch.arange(20), torch.arange(28)]).int().expand(8, -1)
    rows = PackedRows(ids, positions, torch.where(positions == 0, -100, ids))
    return Corpus(rows, rows[:2], "", "", {})


@pytest.fixture
def make_run(random_teacher: Any, corpus: Corpus, tmp_path: Path) -> Callable[..., Run]:
    """A run on a random teacher, converted where a mixer is given; `folder` tells runs apart."""

    def make(mixer: Mixer | None = None, folder: str = "stages", **options: Any) -> Run:
        model = random_teacher(**options)
        surgery = None if mixer is None else convert(model, mixer.model_dump())
        return Run(
            model,
            surgery,
            corpus,
            tmp_path / folder,
            0,
            torch.device("cpu"),
            metrics=tmp_path / folder / "metrics.jsonl",
            load_teacher=lambda device: random_teacher(**options).to(device),
        )

    return make


@pytest.fixture
def liger() -> Mixer:
    """A hybrid that starts some way from the teacher."""
    return Mixer.model_validate(
        {
            "feature_map": "softmax",
            "gate": {"name": "key", "bias": 2.0},
            "window": {"size": 8, "sinks": 2},
            "combine": "learned",
        }
    )
