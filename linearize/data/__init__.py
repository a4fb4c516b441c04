"""Text -> packed rows with document boundaries, a held-out split and a fingerprint."""

from linearize.data.corpus import Corpus, build_corpus, evaluation_rows
from linearize.data.packing import PackedRows, batches, pack, rows_seen
from linearize.data.preferences import build_preferences
from linearize.data.sources import load_documents

__all__ = [
    "Corpus",
    "PackedRows",
    "batches",
    "build_corpus",
    "build_preferences",
    "evaluation_rows",
    "load_documents",
    "pack",
    "rows_seen",
]
