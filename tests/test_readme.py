"""What the README tells a new user to type exists."""

import ast
import re
import shlex
from pathlib import Path

import click
import pytest
import yaml
from typer.main import get_command

from linearize import cli
from linearize.aliases import alias_names
from linearize.recipe import recipe_names

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", TEXT, re.DOTALL)
LINES = [line.split(" #")[0].strip() for language, text in BLOCKS if language == "sh" for line in text.splitlines()]
COMMANDS = [line for line in LINES if line.startswith("linearize ")]
CODE = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL))


def parse(line: str) -> tuple[str, dict[str, object]]:
    """The command and the parameters that a line means; nothing is run."""
    group = get_command(cli.app)
    words = cli._with_command(shlex.split(line)[1:])
    command = group.get_command(click.Context(group), words[0])
    assert command is not None, words[0]
    return words[0], command.make_context(words[0], words[1:]).params


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_parses(line: str) -> None:
    assert parse(line)[0]


@pytest.mark.parametrize("line", [line for line in COMMANDS if "--model" in line and "validate" not in line])
def test_every_run_has_a_plan(
    line: str, make_teacher, cache: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Models and files of the reader's own are stood in for: a tiny teacher, a copied recipe, a line of text."""
    make_teacher("teacher")
    notes, mine = tmp_path / "notes.jsonl", tmp_path / "mine.yaml"
    notes.write_text('{"text": "hello"}\n')
    mine.write_text((ROOT / "recipes" / "liger.yaml").read_text().replace("name: liger", "name: mine"))
    for name, instead in (("./my-llama", "teacher"), ("Qwen/Qwen2.5-0.5B-Instruct", "teacher")):
        line = line.replace(name, str(tmp_path / instead))
    words = shlex.split(line.replace("notes.jsonl", str(notes)).replace("mine.yaml", str(mine)))[1:]
    words = [] if words[0] == "eval" else [word for word in words if word != "plan"]
    if str(tmp_path / "teacher") in words:
        words.append("data.length=64")
    if words:
        with pytest.raises(SystemExit) as stopped:
            cli.main(["run", *words, "--dry-run"])
        assert not stopped.value.code, capsys.readouterr().err


def test_every_make_target_exists() -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    asked = re.findall(r"\bmake (\w+)", "\n".join([*LINES, *CODE]))
    assert {"demo", "test", "install", "controls"} <= set(asked)
    assert set(asked) <= set(targets)


def test_every_recipe_and_alias_that_is_named_exists() -> None:
    parsed = [parse(line)[1] for line in COMMANDS]
    recipes = {str(given["recipe"]) for given in parsed if given.get("recipe")}
    models = {str(given["model"]) for given in parsed if given.get("model")}
    assert {name for name in recipes if not name.endswith(".yaml")} <= set(recipe_names())
    assert {name for name in models if "/" not in name} <= set(alias_names())
    assert table("| recipe | what |") <= set(recipe_names())
    assert row("aliases") <= set(alias_names())


def test_every_mixer_part_that_is_named_exists() -> None:
    import linearize.mixers  # noqa: F401  (fills the registries)
    from linearize.registry import combines, feature_maps, gates, memories

    kinds = {"feature maps": feature_maps, "gates": gates, "memory": memories, "combine": combines}
    for words, registry in kinds.items():
        assert row(words) <= set(registry.names()), words


def row(name: str) -> set[str]:
    """What a row of the table of supported things names."""
    named = set(re.findall(r"`([^`]+)`", re.search(rf"^\| {name} \|(.*)", TEXT, re.MULTILINE)[1]))
    assert named
    return named


def table(header: str) -> set[str]:
    """What the first column of a table names."""
    lines = TEXT.partition(header)[2].strip().partition("\n\n")[0].splitlines()[1:]
    return {name for line in lines for name in re.findall(r"`([^`]+)`", line.split("|")[1])}


def test_every_flag_that_is_named_exists() -> None:
    known = {word for command in get_command(cli.app).commands.values() for p in command.params for word in p.opts}
    named = {word for text in CODE for word in re.findall(r"(?<!\S)--[\w-]+", text)}
    assert named <= known | {"--help", "--strict", "--debug"}, named - known


def test_every_override_that_is_named_is_a_key() -> None:
    from linearize.recipe import Recipe

    found = [text for text in CODE if re.fullmatch(r"[a-z][\w.]*=[^ ].*", text) and text != "key.path=value"]
    assert len(found) >= 4
    for text in found:
        assert Recipe.from_yaml("liger", [text]).name == "liger"
    exact = yaml.safe_load(next(text for text in CODE if text.startswith("exact_heads: ")))
    assert Recipe.from_yaml("liger", [f"exact_heads={exact['exact_heads']}"]).exact_heads == [(18, 2)]


def test_every_link_leads_to_a_file() -> None:
    for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", TEXT):
        assert (ROOT / target).is_file(), target


def test_python_blocks_parse_and_import_what_exists() -> None:
    import linearize

    blocks = [text for language, text in BLOCKS if language == "python"]
    assert blocks
    for text in blocks:
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "linearize":
                assert node.attr in (*linearize.__all__, "modeling")


def test_the_places_for_measured_tables_are_there() -> None:
    for name in ("demo output", "controls table"):
        assert TEXT.count(f"<!-- {name} -->") == TEXT.count(f"<!-- /{name} -->") == 1
