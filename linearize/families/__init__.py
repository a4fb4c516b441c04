"""Families: where attention sits in a Hugging Face model and how to read its projections.

One file per way of laying attention out; each lists the `model_type`s that it serves in `MODEL_TYPES`.
"""

from linearize.errors import UnknownNameError
from linearize.families import separate
from linearize.families.separate import SeparateProjections

FAMILIES: dict[str, type[SeparateProjections]] = {name: SeparateProjections for name in separate.MODEL_TYPES}


def family_of(model_type: str) -> type[SeparateProjections]:
    """Return the family that serves `model_type`.

    Raises:
        UnknownNameError: no family does.
    """
    if model_type not in FAMILIES:
        raise UnknownNameError("model family", model_type, FAMILIES)
    return FAMILIES[model_type]
