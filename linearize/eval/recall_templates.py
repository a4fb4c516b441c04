"""What recall samples are written with: templates, keys and filler, one set per split, with nothing in common.

The `eval` templates are those that RULER and the passkey test define; the `probe` ones are ours.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

from linearize.data.sources import builtin_rows


@dataclass(frozen=True)
class Wording:
    """A template: `intro` opens the text, `fact` is hidden in it, `question` asks, `again` asks for one more."""

    intro: str
    fact: str
    question: str
    again: str = ""


SPLITS: dict[str, dict[str, Wording]] = {
    "eval": {
        "passkey": Wording(
            "There is important information hidden inside a lot of irrelevant text. Find it and memorize it.\n",
            "The pass key is {value}. Remember it. {value} is the pass key.",
            "\nWhat is the pass key? The pass key is",
        ),
        "needle": Wording(
            "Some special magic {kind}s are hidden within the following text. Make sure to memorize them. I will quiz "
            "you about the {kind}s afterwards.\n",
            "One of the special magic {kind}s for {key} is: {value}.",
            "\nWhat is the special magic {kind} for {key} mentioned in the provided text? The special magic {kind} for "
            "{key} mentioned in the provided text is:",
        ),
        "pairs": Wording("Names and their values:\n", "{key}: {value}.", "\n{key}:", "\n{key}:"),
    },
    "probe": {
        "passkey": Wording(
            "Somewhere in these pages stands the combination of a safe. Look out for it.\n",
            "Note that the safe opens with {value}. Once more, the safe opens with {value}.",
            "\nThe owner comes back and looks up the combination. Note that the safe opens with",
        ),
        "needle": Wording(
            "A clerk has left entries between the lines of this report. Each gives one {kind} to one room.\n",
            "Entry: room {key} was given {value}.",
            "\nEnd of the report. We copy an entry out of it. Entry: room {key} was given",
        ),
        "pairs": Wording("Who sits where:\n", "{key} = {value};", "\n{key} =", "\n{key} ="),
    },
}

NOISE: dict[str, tuple[str, ...]] = {
    "eval": ("The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again."),
    "probe": (
        "A kettle sings on the stove.",
        "Rain taps at the window.",
        "Somebody turns a page.",
        "The clock has stopped.",
        "Nothing else moves in the house.",
    ),
}

KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "eval": (
        ("brave", "calm", "dusty", "eager", "fancy", "gentle", "hollow", "icy", "jolly", "keen", "lively", "modest"),
        ("anchor", "bridge", "candle", "desert", "engine", "forest", "guitar", "harbor", "island", "jacket", "ladder"),
    ),
    "probe": (
        (
            "amber",
            "bitter",
            "clever",
            "distant",
            "early",
            "faded",
            "golden",
            "honest",
            "idle",
            "loud",
            "narrow",
            "pale",
        ),
        ("apple", "bottle", "castle", "dragon", "feather", "garden", "hammer", "insect", "kitten", "lemon", "mirror"),
    ),
}


@cache
def haystack(split: str, noise: bool) -> tuple[str, ...]:
    """Return the filler sentences of a split: a few of noise, or the prose of every second builtin document."""
    if noise:
        return NOISE[split]
    documents = [row["text"] for index, row in enumerate(builtin_rows()) if index % 2 == list(SPLITS).index(split)]
    other = set() if split == "eval" else set(haystack("eval", False))
    return tuple(text for text in dict.fromkeys(_sentences("\n\n".join(documents))) if text not in other)


def _sentences(text: str) -> list[str]:
    """Return the sentences of the paragraphs that are prose: no lists, headings or code."""
    found = []
    for paragraph in re.split(r"\n\s*\n", text):
        if paragraph.startswith(" ") or not paragraph[:1].isupper() or "***" in paragraph or "===" in paragraph:
            continue
        flat = " ".join(paragraph.split())
        found += [part for part in re.split(r"(?<=[.?!]) (?=[A-Z])", flat) if part.endswith(".") and len(part) > 40]
    return found
