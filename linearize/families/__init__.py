"""Families: where attention sits in a Hugging Face model and how to read its projections.

One file per way of laying attention out; it registers the `model_type`s that it serves. Importing this package imports
every file in it.
"""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
