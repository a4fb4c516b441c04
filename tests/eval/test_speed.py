import pytest
import torch

from linearize.eval import kv_cache_bytes
from linearize.eval.speed import measure_speed
from linearize.surgery import convert


def test_a_teacher_and_its_student_are_timed_by_the_same_loop(random_teacher, make_mixer) -> None:
    model = random_teacher()
    first = measure_speed(model, 24, 3, new_tokens=4, repeats=1)
    assert (first.context, first.batch, first.peak_bytes, first.note) == (24, 3, None, "")
    assert first.prefill == pytest.approx(3 * 24 / first.first_token)
    assert first.decode > 0
    assert first.cache_bytes == kv_cache_bytes(model.config, 24 + 5, torch.float32, 3)
    convert(model, make_mixer(combine="average", feature_map="softmax", window={"size": 5}))
    short, long = (measure_speed(model, context, 3, new_tokens=4, repeats=1) for context in (24, 48))
    assert short.cache_bytes == long.cache_bytes < first.cache_bytes


@pytest.mark.parametrize(
    ("kind", "words"),
    [(torch.cuda.OutOfMemoryError, "no room"), (RuntimeError, "CUDA error: out of memory\nSearch for")],
)
def test_what_does_not_fit_is_said(kind: type, words: str, random_teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_teacher()

    def full(*_: object, **__: object) -> None:
        raise kind(words)

    monkeypatch.setattr(model, "forward", full)
    row = measure_speed(model, 8, 1)
    assert (row.note, row.decode, row.cache_bytes) == ("out of memory", None, None)
