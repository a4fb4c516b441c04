"""Importing this registers linearized models with transformers' Auto classes."""

import linearize.families
import linearize.mixers  # noqa: F401  (fills the registries of mixer parts)
from linearize.modeling.classes import Classes, auto_class, classes_for, register_all

register_all()

__all__ = ["Classes", "auto_class", "classes_for", "register_all"]
