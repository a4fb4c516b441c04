"""Text -> packed rows with document boundaries, a held-out split and a fingerprint."""

from linearize.data.corpus import Corpus, build_corpus
from linearize.data.packing import PackedRows, batches, pack
from linearize.data.sources import load_documents

__all__ = ["Corpus", "PackedRows", "batches", "build_corpus", "load_documents", "pack"]
