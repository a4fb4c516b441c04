"""What `linearize ls` and `linearize cp` do."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from rich.table import Table

from linearize.aliases import alias_names, read_alias
from linearize.errors import LinearizeError, UnknownNameError
from linearize.fetch import cached_alias
from linearize.recipe import Recipe, recipe_names, recipe_path


def tables(what: str | None = None) -> list[Table]:
    """Return the tables of one kind, or of all.

    Args:
        what: `recipes`, `models`, `parts` or `families`.

    Raises:
        UnknownNameError: it is none of them.
    """
    if what is not None and what not in KINDS:
        raise UnknownNameError("list", what, KINDS)
    return [make() for kind, make in KINDS.items() if what in (None, kind)]


def copy_recipe(recipe: str, file: Path) -> None:
    """Copy a recipe's text to a new file, under the new file's name.

    Args:
        recipe: name or YAML file.
        file: must end in .yaml and not exist.

    Raises:
        LinearizeError: the recipe does not exist, or the file does or is no YAML file.
    """
    text = recipe_path(recipe).read_text(encoding="utf-8")
    name = Recipe.from_yaml(recipe).name
    if file.suffix not in (".yaml", ".yml"):
        raise LinearizeError(f"{file} must end in .yaml, so that --recipe takes it for a file.")
    if file.exists():
        raise LinearizeError(f"{file} exists already; give another name, or remove it first.")
    if not file.parent.is_dir():
        raise LinearizeError(f"There is no folder {file.parent} for {file.name}; make it first.")
    text = re.sub(r"^(# .*--recipe )\S+", lambda match: f"{match[1]}{file}", text)
    text = re.sub(rf"^name: {re.escape(name)}$", f"name: {file.stem}", text, count=1, flags=re.MULTILINE)
    file.write_text(text, encoding="utf-8")


def _recipes() -> Table:
    table = Table("recipe", "stages", "description")
    for name in recipe_names():
        recipe = Recipe.from_yaml(name)
        table.add_row(name, ", ".join(stage.stage for stage in recipe.stages), recipe.description)
    return table


def _models() -> Table:
    table = Table("model", "family", "licence", "cached", "sources")
    for name in alias_names():
        alias = read_alias(name)
        sources = "\n".join(map(str, alias.sources))
        table.add_row(name, alias.family, alias.license, "yes" if cached_alias(name) else "", sources)
    return table


def _parts() -> Table:
    import linearize.mixers  # noqa: F401  (fills the registries)
    from linearize.registry import combines, feature_maps, gates, memories

    table = Table("part", "name", "what it is")
    for registry in (feature_maps, gates, memories, combines):
        for name in registry.names():
            words = (registry.get(name).__doc__ or "").strip().partition("\n")[0]
            table.add_row(registry.kind, name, words.replace("[", r"\["))
    return table


def _families() -> Table:
    import linearize.families  # noqa: F401  (fills the registry)
    from linearize.registry import families

    table = Table("model family", "read by")
    for name in families.names():
        table.add_row(name, families.get(name).__name__)
    return table


KINDS: dict[str, Callable[[], Table]] = {
    "recipes": _recipes,
    "models": _models,
    "parts": _parts,
    "families": _families,
}
