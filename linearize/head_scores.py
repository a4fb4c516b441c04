"""What the probe measured: the worth of each layer and KV head as exact softmax; the ranking, the file, the choice.

A unit is a KV head with its query group, or a whole layer. Its scores say what the teacher loses where that unit alone
gives up exact softmax for the window.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from linearize.checkpoint import replace_text
from linearize.errors import LinearizeError
from linearize.recipe import ExactHeads, Probe, Recipe, SoftmaxLayers
from linearize.recipe_mixer import HeadMeasure, Measure
from linearize.registry import families

FILE = "probe.json"
HALO_CAP = 50.0


@dataclass(frozen=True)
class UnitScore:
    """What a unit is worth; more is worse to lose.

    Attributes:
        layer: of the unit.
        head: KV head, or None for the whole layer.
        recall: drop of the log-probability of the answer, in nats, mean over the recall samples.
        accuracy: drop of the share of answer tokens (digits) that are the model's first choice.
        kl: KL(teacher || candidate) in nats, mean over tokens of prose.
        transfer: squared error of the layer's attention output over its mean square.
        language: rise of the cross-entropy on the same prose, in nats a token.
        halo: drop of recall over drop of language modelling, see `halo_scores`.
    """

    layer: int
    head: int | None
    recall: float
    accuracy: float
    kl: float
    transfer: float
    language: float
    halo: float = 0.0

    @property
    def lost(self) -> float:
        """What the unit costs, in nats: divergence on prose and what answers lose; where they gain, nothing."""
        return self.kl + max(0.0, self.recall)


@dataclass(frozen=True)
class ProbeScores:
    """A probe of one teacher.

    Attributes:
        model: the teacher's name.
        layers: how many it has.
        kv_heads: of each layer.
        window: what a unit got in the place of exact softmax: `size` and `sinks`.
        samples: what it was scored on: tasks, lengths, samples of each, seed.
        teacher: the teacher's own `log_prob` and `accuracy` on the answers, and `language`, its cross-entropy on prose.
        units: every KV head and every layer.
        joint: heads in the order of what they are worth together, the first the last to be given up; none unless asked.
        losses: for each size of `mixer.window.size.among`, what each layer loses on it (`UnitScore.lost`).
        seconds: wall time.
    """

    model: str
    layers: int
    kv_heads: int
    window: dict[str, int]
    samples: dict[str, Any]
    teacher: dict[str, float]
    units: tuple[UnitScore, ...]
    joint: tuple[tuple[int, int], ...] = ()
    losses: dict[str, list[float]] = field(default_factory=dict)
    seconds: float = 0.0

    def heads(self) -> list[UnitScore]:
        """Return the KV heads' scores, by layer and head."""
        return [unit for unit in self.units if unit.head is not None]

    def rank_heads(self, by: HeadMeasure) -> list[tuple[int, int]]:
        """Return (layer, KV head) of every head, the one that is worst to lose first."""
        if by == "joint":  # behind the heads that were tried together, the others by their recall
            return [*self.joint, *(pair for pair in self.rank_heads("recall") if pair not in self.joint)]
        ranked = sorted(self.heads(), key=lambda unit: -float(getattr(unit, by)))
        return [(unit.layer, unit.head) for unit in ranked if unit.head is not None]

    def rank_layers(self, by: Measure) -> list[int]:
        """Return every layer, the one that is worst to lose first."""
        whole = [unit for unit in self.units if unit.head is None]
        return [unit.layer for unit in sorted(whole, key=lambda unit: -float(getattr(unit, by)))]

    def write(self, path: Path) -> None:
        """Write the scores as JSON; the file appears whole or not at all."""
        replace_text(path, json.dumps(asdict(self), indent=1))

    @classmethod
    def read(cls, path: Path) -> ProbeScores:
        """Return the scores in a file.

        Raises:
            LinearizeError: there is no such file, or it is no probe.json.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            units = tuple(UnitScore(**unit) for unit in content.pop("units"))
            joint = tuple((layer, head) for layer, head in content.pop("joint"))
            return cls(units=units, joint=joint, **content)
        except OSError as error:
            raise LinearizeError(
                f"The probe's file {path} cannot be read: {error.strerror}. `linearize probe` writes one."
            ) from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise LinearizeError(f"{path} is no probe.json of this version; make it anew: linearize probe.") from error

    def check(self, config: Any, recipe: Recipe, where: str) -> None:
        """Raise unless the scores are those of this teacher under this recipe's window.

        Raises:
            LinearizeError: they are not.
        """
        sizes = config.num_hidden_layers, families.get(config.model_type).heads(None, config)[1]
        if (self.layers, self.kv_heads) != sizes:
            raise LinearizeError(
                f"{where} scored {self.model}, with {self.layers} layers of {self.kv_heads} KV heads; this teacher has "
                f"{sizes[0]} of {sizes[1]}. Make its own: linearize probe."
            )
        window = probe_window(recipe)
        if self.window != window:
            raise LinearizeError(
                f"{where} scored heads under the window {self.window}, and the recipe's is {window}, where other heads "
                "may matter. Make it anew with `linearize probe --recipe`, or give the heads as a list."
            )
        if isinstance(recipe.exact_heads, ExactHeads) and recipe.exact_heads.by == "joint" and not self.joint:
            raise LinearizeError(
                f"{where} scored heads one at a time, and the recipe chooses them by `joint`. Make it anew with "
                "`linearize probe --recipe`, and --fresh or another --output."
            )
        budget = recipe.window_budget
        if budget is not None and [int(size) for size in self.losses] != budget.among:
            raise LinearizeError(
                f"{where} scored layers under windows of {', '.join(self.losses) or 'one size'}, and the recipe lets "
                f"them choose among {budget.among}. Make it anew with `linearize probe --recipe`."
            )


def probe_window(recipe: Recipe) -> dict[str, int]:
    """Return the window that stands in for a head: the recipe's smallest, or 64 tokens and 4 sinks without."""
    window = None if recipe.mixer is None else recipe.mixer.window
    return {"size": 64, "sinks": 4} if window is None else {"size": window.sizes[0], "sinks": window.sinks}


def halo_scores(recall: Sequence[float], language: Sequence[float], cap: float = HALO_CAP) -> list[float]:
    """Return HALO's importance of each unit: `(max R - R) / (max L - L)`, at most `cap`.

    Args:
        recall: R, the model's recall without the unit; more is better.
        language: L, its language modelling without the unit; more is better.
        cap: where the score ends; also where a unit costs recall and no language.
    """
    scores = []
    for r, other in zip(recall, language, strict=True):
        lost, cost = max(recall) - r, max(language) - other
        scores.append(0.0 if lost <= 0 else min(cap, lost / cost) if cost > 0 else cap)
    return scores


def with_halo(units: Sequence[UnitScore]) -> tuple[UnitScore, ...]:
    """Fill in `halo`, among the heads and among the layers."""
    filled: dict[int, UnitScore] = {}
    for whole in (False, True):
        places = [place for place, unit in enumerate(units) if (unit.head is None) == whole]
        ratios = halo_scores([-units[place].recall for place in places], [-units[place].language for place in places])
        filled.update({place: replace(units[place], halo=ratio) for place, ratio in zip(places, ratios, strict=True)})
    return tuple(filled[place] for place in range(len(units)))


def choose_windows(scores: dict[int, list[float]], tokens: int, layers: Sequence[int] | None = None) -> list[int]:
    """Return a window for each layer: the sizes whose losses add up to little, greedily.

    Every layer begins with the smallest size. The step from there, of one layer to one larger size, that lowers its
    loss most for each token more is taken as long as it fits, and so on. A size does no worse than a smaller one: a
    loss that says so is noise, and steps that gain nothing are taken last, those of the layers that lose most first.

    Args:
        scores: of each size, from small to large, the layers' losses.
        tokens: what the sizes of the chosen layers may add up to.
        layers: which layers have windows; all by default. Others are given the smallest size.
    """
    sizes, count = list(scores), len(next(iter(scores.values())))
    lowest = [
        [min(scores[size][layer] for size in sizes[: i + 1]) for i in range(len(sizes))] for layer in range(count)
    ]
    chosen = [0] * count
    layers = range(count) if layers is None else layers
    left = tokens - sizes[0] * len(layers)
    while True:
        steps = [
            (
                (lowest[layer][chosen[layer]] - lowest[layer][to]) / (sizes[to] - sizes[chosen[layer]]),
                lowest[layer][chosen[layer]],
                layer,
                to,
            )
            for layer in layers
            for to in range(chosen[layer] + 1, len(sizes))
            if sizes[to] - sizes[chosen[layer]] <= left
        ]
        if not steps:
            return [sizes[place] for place in chosen]
        _, _, layer, to = max(steps)
        left -= sizes[to] - sizes[chosen[layer]]
        chosen[layer] = to


def choose_layers(recipe: Recipe, scores: ProbeScores, offered: Sequence[int] | None = None) -> Recipe:
    """Return the recipe with the layers that the probe chose, as a list of those to convert.

    Args:
        recipe: with or without such a choice.
        scores: of the teacher.
        offered: the layers to choose among, those that the family converts; all by default.
    """
    if not isinstance(recipe.layers, SoftmaxLayers) or recipe.layers.by is None:
        return recipe
    among = range(scores.layers) if offered is None else offered
    count = len(among) - len(recipe.converted_layers(len(among)))
    kept = [layer for layer in scores.rank_layers(recipe.layers.by) if layer in among][:count]
    return recipe.model_copy(update={"layers": [layer for layer in among if layer not in kept]})


def choose_memories(
    recipe: Recipe, scores: ProbeScores, converted: Sequence[int], exact: Collection[int] = ()
) -> Recipe:
    """Return the recipe with a memory in those of its converted layers that the probe ranks first, as a list.

    Args:
        recipe: with or without such a choice.
        scores: of the teacher.
        converted: the converted layers.
        exact: those among them whose heads are all exact, which leaves nothing to a memory.
    """
    choice = recipe.memory_choice
    if choice is None:
        return recipe
    ranked = [layer for layer in scores.rank_layers(choice.by) if layer in converted and layer not in exact]
    return recipe.with_memories(sorted(ranked[: choice.count(len(converted))]) or "all")


def choose_heads(recipe: Recipe, scores: ProbeScores, count: int, converted: Sequence[int] | None = None) -> Recipe:
    """Return the recipe with the `count` heads of its converted layers that the probe ranks first, as a list.

    Args:
        recipe: with or without such a choice.
        scores: of the teacher.
        count: how many heads.
        converted: the converted layers; by default those that the recipe names among all.
    """
    converted = recipe.converted_layers(scores.layers) if converted is None else converted
    update: dict[str, Any] = {"probe": Probe()}
    if isinstance(recipe.exact_heads, ExactHeads):
        ranked = [pair for pair in scores.rank_heads(recipe.exact_heads.by) if pair[0] in converted]
        update["exact_heads"] = ranked[:count]
    return recipe.model_copy(update=update)
