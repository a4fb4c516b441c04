import json
import math

import pytest

from linearize.errors import LinearizeError
from linearize.report import MetricsWriter, read_metrics


def log(writer, stage, steps):
    for step in steps:
        writer.write(stage, step, loss=1 / step, tokens=step * 64, tokens_per_second=1000.0)


def steps(path):
    return [(record["stage"], record["step"]) for record in read_metrics(path)]


def test_records_come_back_as_written(tmp_path):
    path = tmp_path / "new" / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.write("transfer", 1, loss=0.5, tokens=64, tokens_per_second=12.34, layers={0: 0.25, 7: 0.75}, lr=1e-3)
    assert read_metrics(path) == [
        {
            "stage": "transfer",
            "step": 1,
            "loss": 0.5,
            "tokens": 64,
            "tokens_per_second": 12.3,
            "layers": {"0": 0.25, "7": 0.75},
            "lr": 1e-3,
        }
    ]


def test_each_record_is_on_disk_at_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path)
    log(writer, "transfer", [1, 2])
    assert steps(path) == [("transfer", 1), ("transfer", 2)]
    writer.close()


def test_no_file_is_no_records(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_cut_last_line_is_left_out_and_not_continued(tmp_path, cut):
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        log(writer, "transfer", [1, 2, 3])
    path.write_bytes(path.read_bytes()[:-cut])
    assert steps(path) == [("transfer", 1), ("transfer", 2)]
    with MetricsWriter(path) as writer:
        log(writer, "transfer", [3])
    assert steps(path) == [("transfer", 1), ("transfer", 2), ("transfer", 3)]


def test_a_damaged_line_in_the_middle_is_an_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"stage": "a", "step": 1}\n{"stage"\n{"stage": "a", "step": 3}\n')
    with pytest.raises(LinearizeError, match=r"Line 2 of .*metrics\.jsonl"):
        read_metrics(path)


@pytest.mark.parametrize(
    ("resume", "kept"),
    [
        (("transfer", 0), []),
        (("transfer", 2), [("transfer", 1), ("transfer", 2)]),
        (("transfer", 4), [("transfer", step) for step in (1, 2, 3, 4)]),
        (("finetune", 0), [("transfer", step) for step in (1, 2, 3, 4)]),
        (("finetune", 1), [*(("transfer", step) for step in (1, 2, 3, 4)), ("finetune", 1)]),
        (("third", 0), [*(("transfer", step) for step in (1, 2, 3, 4)), *(("finetune", step) for step in (1, 2, 3))]),
    ],
)
def test_resuming_rewinds_to_the_checkpoint(tmp_path, resume, kept):
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        log(writer, "transfer", [1, 2, 3, 4])
        log(writer, "finetune", [1, 2, 3])
    path.write_bytes(path.read_bytes() + b'{"stage": "fin')
    MetricsWriter(path, resume=resume).close()
    assert steps(path) == kept


def test_a_resumed_run_logs_every_step_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        log(writer, "transfer", range(1, 8))
    with MetricsWriter(path, resume=("transfer", 5)) as writer:
        log(writer, "transfer", range(6, 11))
    assert steps(path) == [("transfer", step) for step in range(1, 11)]


def test_numbers_that_json_lacks_are_null(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.write("a", 1, loss=math.nan, tokens=1, tokens_per_second=1.0, layers={0: math.inf})

    def refuse(name):
        raise AssertionError(name)

    record = json.loads(path.read_text(), parse_constant=refuse)
    assert record["loss"] is None
    assert record["layers"] == {"0": None}
