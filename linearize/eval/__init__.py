"""Evaluation: held-out quality against the teacher, cache bytes, sample continuations."""

from linearize.eval.generation import sample
from linearize.eval.memory import format_bytes, kv_cache_bytes, tensor_bytes
from linearize.eval.quality import PositionBucket, Quality, TeacherReference, evaluate

__all__ = [
    "PositionBucket",
    "Quality",
    "TeacherReference",
    "evaluate",
    "format_bytes",
    "kv_cache_bytes",
    "sample",
    "tensor_bytes",
]
