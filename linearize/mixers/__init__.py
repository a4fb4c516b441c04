"""Mixer parts and the check of a recipe's mixer against them."""

from linearize.mixers import combine, feature_maps, gates, memories, retain  # noqa: F401  (fill the registries)
from linearize.mixers.check import check_mixer

__all__ = ["check_mixer"]
