import pytest

from linearize.errors import LinearizeError
from linearize.eval.recall import TASKS as RECALL
from linearize.eval.suite import SUITES, choose_suite
from linearize.eval.task_data import TASKS


def test_paper_and_full_measure_every_task() -> None:
    for name in ("paper", "full"):
        assert set(SUITES[name].tasks) == set(TASKS)
        assert set(SUITES[name].recall) == set(RECALL)
        assert SUITES[name].samples >= 500
    assert {256, 32768} <= set(SUITES["full"].recall_lengths)
    assert SUITES["full"].contexts
    assert choose_suite("quick", rows=None, samples=None) == SUITES["quick"]


def test_choices_replace_a_suite_s() -> None:
    chosen = choose_suite(
        "full", recall="mqar", lengths="1024, 512", tasks="none", contexts="64", batches="2,1", rows=3
    )
    assert (chosen.recall, chosen.recall_lengths, chosen.tasks) == (("mqar",), (512, 1024), ())
    assert (chosen.contexts, chosen.speed_batches, chosen.rows) == ((64,), (1, 2), 3)
    assert choose_suite("quick", contexts="64").speed_batches == (1,)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": "quik"}, "Did you mean 'quick'"),
        ({"name": "quick", "recall": "passkeys"}, "Did you mean 'passkey'"),
        ({"name": "quick", "tasks": "piqua"}, "Did you mean 'piqa'"),
        ({"name": "quick", "tasks": "none,piqa"}, "--tasks is 'none,piqa'; give tasks, .* or `none` alone"),
        ({"name": "quick", "recall": ","}, "--recall is ','; give recall tasks"),
        ({"name": "quick", "lengths": "many"}, "--lengths is 'many'"),
        ({"name": "quick", "contexts": "0"}, "--contexts is '0'"),
        ({"name": "quick", "limit": 5}, "--limit changes nothing"),
        ({"name": "quick", "recall": "none", "lengths": "64"}, "--lengths changes nothing"),
        ({"name": "quick", "batches": "2"}, "--batches changes nothing"),
        ({"name": "quick", "recall": "none", "generation": False, "samples": 9}, "--samples changes nothing"),
    ],
)
def test_what_cannot_be_meant_is_refused(settings, words) -> None:
    with pytest.raises(LinearizeError, match=words):
        choose_suite(**settings)
