"""The probe: convert one layer, or one KV head, at a time, and see what the teacher loses.

A candidate is the teacher with one unit (a KV head with its query group, or all heads of a layer) on the recipe's
window and all else exact. It has no memory, which nothing has trained yet. All candidates of a layer see the same
input: the teacher runs once and its hidden states are kept, a layer's exact and windowed heads are computed once each,
and the candidates run as one batch through the layers above. So the whole costs about half of (heads + layers) forward
passes.

Heads that stand in for one another are worth less one at a time than together. So `joint` begins with the heads worst
to lose alone, all others of the converted layers on the window, and gives them up again, least loss first (backward
elimination); candidates run as before, from that student and not from the teacher. Heads whose loss alone shows nothing
at all are not among those that it begins with.

Legend: B samples, T tokens, H query heads, G KV heads, D hidden size, C candidates of a layer, P places with logits,
V vocabulary.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from linearize.errors import LinearizeError
from linearize.eval.logits import evaluation_mode
from linearize.eval.recall import TASKS, RecallTask, Sample, batches, make_samples, sample_scores, tensors
from linearize.head_scores import ProbeScores, UnitScore, choose_layers, probe_window, with_halo
from linearize.mixers.attention import LinearizedAttention
from linearize.mixers.context import SequenceContext
from linearize.modeling.classes import family_of, layers_of
from linearize.planning import converted_layers
from linearize.recipe import ExactHeads, Recipe
from linearize.recipe_mixer import Mixer, Part, Window

TOKENS_PER_BATCH = {"cpu": 8192, "cuda": 32768}
PROSE_PLACES = 48  # tokens of a sample at which language is measured
QUESTION = 64  # tokens between the last fact and the answer, so that no window reaches from one to the other
TOGETHER = 5  # `joint` tries one head in so many, those whose recall is worst to lose,
SPARE = 2  # or so many for each that may be chosen, where that is more,
STEP = 8  # and gives up one in so many of what is left at a time, at least one

Progress = Callable[[int, int], None]


def probe_lengths(recipe: Recipe) -> list[int]:
    """Return the lengths of the samples: as the recipe says, or 2, 4 and 8 windows that fit in its rows."""
    if recipe.probe.lengths is not None:
        return recipe.probe.lengths
    shortest = max(2 * probe_window(recipe)["size"], 256)
    return [length for length in (shortest, 2 * shortest, 4 * shortest) if length <= max(recipe.data.length, shortest)]


def sample_settings(recipe: Recipe, seed: int) -> dict[str, Any]:
    """Return what the samples follow from, as it stands in probe.json."""
    spec = recipe.probe
    return {"tasks": spec.tasks, "lengths": probe_lengths(recipe), "samples": spec.samples, "seed": seed}


def probe_samples(recipe: Recipe, tokenizer: Any, context: int | None, seed: int) -> list[tuple[Sample, bool]]:
    """Return the recall samples, their facts out of the window's reach, each with whether its filler is prose.

    Raises:
        LinearizeError: a length is too short for the window or the task, or beyond the teacher's context.
    """
    window, samples = probe_window(recipe)["size"], []
    for length in probe_lengths(recipe):
        if context is not None and length > context:
            raise LinearizeError(f"The probe's samples of {length} tokens are beyond the teacher's context, {context}.")
        reach = 1 - (window + QUESTION) / length
        if reach <= 0:
            raise LinearizeError(
                f"The probe's samples of {length} tokens lie inside the window of {window}, where nothing is lost; "
                f"set probe.lengths=[{2 * window + QUESTION}] or more."
            )
        for name in recipe.probe.tasks:
            task = RecallTask(name, length, recipe.probe.samples, seed, "probe", (0.0, reach))
            samples += [(sample, not TASKS[name].noise) for sample in make_samples(task, tokenizer)]
    return samples


def run_probe(
    model: Any,
    tokenizer: Any,
    recipe: Recipe,
    *,
    name: str = "teacher",
    seed: int = 0,
    progress: Progress | None = None,
) -> ProbeScores:
    """Score every KV head and every layer of a teacher.

    Args:
        model: the teacher, of a known family, not converted.
        tokenizer: its own.
        recipe: gives the window and the `probe` section.
        name: the teacher's, for the report.
        seed: of the samples.
        progress: told of (layers done, layers in all) over all batches.

    Raises:
        LinearizeError: samples cannot be made at these lengths.
    """
    began = time.perf_counter()
    samples = probe_samples(recipe, tokenizer, getattr(model.config, "max_position_embeddings", None), seed)
    window = probe_window(recipe)
    teacher, units = score_units(model, samples, window, progress)
    budget = recipe.window_budget
    losses: dict[str, list[float]] = {}
    if budget is not None:  # at the smallest size, the heads' own, whole layers are scored already
        losses[str(window["size"])] = [unit.lost for unit in units if unit.head is None]
        losses |= {str(size): score_layers(model, samples, {**window, "size": size}) for size in budget.among[1:]}
    scores = ProbeScores(
        model=name,
        layers=model.config.num_hidden_layers,
        kv_heads=family_of(model.config).heads(None, model.config)[1],
        window=window,
        samples=sample_settings(recipe, seed),
        teacher=teacher,
        units=units,
        losses=losses,
    )
    asked = recipe.exact_heads
    if isinstance(asked, ExactHeads) and asked.by == "joint":
        offered = family_of(model.config).convertible(model.config)
        layers = converted_layers(choose_layers(recipe, scores, offered), model.config)
        heads = [pair for pair in scores.rank_heads("recall") if pair[0] in layers]
        most = asked.keep or math.ceil((asked.cache or 0) * len(heads))
        half = max(probe_lengths(recipe)) // 2
        longest = [pair for pair in samples if len(pair[0].prompt_ids) > half]
        tried = heads[: max(len(heads) // TOGETHER, SPARE * most)]
        scores = replace(scores, joint=rank_together(model, longest, window, tried, layers))
    return replace(scores, seconds=round(time.perf_counter() - began, 1))


def score_units(
    model: Any,
    samples: Sequence[tuple[Sample, bool]],
    window: dict[str, int],
    progress: Progress | None = None,
    *,
    heads: bool = True,
) -> tuple[dict[str, float], tuple[UnitScore, ...]]:
    """Score every unit of a teacher on recall samples.

    Args:
        model: the teacher.
        samples: each with whether its filler is prose, on which divergence and language are measured.
        window: `size` and `sinks` of what a unit gets.
        progress: see `run_probe`.
        heads: KV heads too, or whole layers alone.

    Returns:
        The teacher's own log-probability, accuracy and cross-entropy, and the units' scores.
    """
    attention = _Branches(model, window)
    parts = [*(range(attention.groups) if heads else ()), None]  # of a layer; None is the whole
    units = [(layer, part) for layer in range(attention.layers) for part in parts]
    tallies = {unit: _Tally() for unit in units}
    teacher = _Tally()
    pending = list(_batches(samples, _room(model, len(parts))))
    with evaluation_mode(model):
        for turn, chosen in enumerate(pending):
            batch = _Batch(model, chosen)
            batch.add(batch.teacher_logits, teacher)
            for layer in range(attention.layers):
                for several in _chunks(parts, batch.rows):
                    logits, errors = batch.candidates(attention, layer, [attention.without(part) for part in several])
                    for part, made, error in zip(several, logits, errors, strict=True):
                        tallies[layer, part].errors.append(error)
                        batch.add(made, tallies[layer, part])
                if progress is not None:
                    progress(turn * attention.layers + layer + 1, len(pending) * attention.layers)
    own = {"log_prob": teacher.log_prob, "accuracy": teacher.accuracy, "language": teacher.language}
    return own, with_halo([tallies[unit].unit(*unit, teacher) for unit in units])


def score_layers(model: Any, samples: Sequence[tuple[Sample, bool]], window: dict[str, int]) -> list[float]:
    """Return what each layer loses on a window, as `UnitScore.lost` has it.

    Args:
        model: the teacher.
        samples: see `score_units`.
        window: `size` and `sinks`.

    Raises:
        LinearizeError: no sample's filler is prose.
    """
    if not any(is_prose for _, is_prose in samples):
        raise LinearizeError(
            "Sizes of windows are chosen by recall and by the divergence on prose, and the probe's tasks have none; "
            "add one to probe.tasks, such as multikey_niah."
        )
    _, units = score_units(model, samples, window, heads=False)
    return [unit.lost for unit in units]


def rank_together(
    model: Any,
    samples: Sequence[tuple[Sample, bool]],
    window: dict[str, int],
    heads: Sequence[tuple[int, int]],
    layers: Sequence[int] | None = None,
) -> tuple[tuple[int, int], ...]:
    """Order KV heads by what they are worth together: backward elimination from a student that has no other exact head.

    Args:
        model: the teacher.
        samples: see `score_units`.
        window: `size` and `sinks` of every other head of these layers.
        heads: (layer, KV head) to begin with.
        layers: those that are converted, all by default; the others keep all their heads.

    Returns:
        The same heads; the last to be given up, the one without which recall is lost, comes first.
    """
    attention, kept = _Branches(model, window), list(heads)
    converted = range(attention.layers) if layers is None else layers
    given_up: list[tuple[int, int]] = []
    pending = list(_batches(samples, _room(model, attention.groups)))
    with evaluation_mode(model):
        while kept:
            tallies = {pair: _Tally() for pair in kept}
            exact = {layer: frozenset(head for at, head in kept if at == layer) for layer in converted}
            for chosen in pending:
                with attention.student(model, exact):
                    batch = _Batch(model, chosen)
                    for layer, heads_here in exact.items():
                        if not heads_here:
                            continue
                        without = [heads_here - {head} for head in sorted(heads_here)]
                        logits, _ = batch.candidates(attention, layer, without)
                        for head, made in zip(sorted(heads_here), logits, strict=True):
                            batch.add(made, tallies[layer, head])
            kept.sort(key=lambda pair: -tallies[pair].log_prob)  # the head that is missed least comes first
            count = max(1, len(kept) // STEP)
            given_up += kept[:count]
            kept = kept[count:]
    return tuple(reversed(given_up))


@dataclass
class _Tally:
    """Sums of one candidate over the samples."""

    answers: list[tuple[float, float]] = field(default_factory=list)
    prose: list[tuple[float, float, int]] = field(default_factory=list)
    errors: list[tuple[float, float]] = field(default_factory=list)

    @property
    def log_prob(self) -> float:
        return sum(log_prob for log_prob, _ in self.answers) / len(self.answers)

    @property
    def accuracy(self) -> float:
        return sum(accuracy for _, accuracy in self.answers) / len(self.answers)

    @property
    def language(self) -> float:
        return self._per_token(0)

    @property
    def kl(self) -> float:
        return self._per_token(1)

    def _per_token(self, which: int) -> float:
        tokens = sum(entry[2] for entry in self.prose)
        return sum(entry[which] for entry in self.prose) / tokens if tokens else 0.0

    def unit(self, layer: int, head: int | None, teacher: _Tally) -> UnitScore:
        wrong, size = (sum(values) for values in zip(*self.errors, strict=True))
        return UnitScore(
            layer=layer,
            head=head,
            recall=teacher.log_prob - self.log_prob,
            accuracy=teacher.accuracy - self.accuracy,
            kl=self.kl,
            transfer=wrong / size,
            language=self.language - teacher.language,
        )


class _Branches:
    """Both attentions of every layer: all heads exact, and all heads on the window; the weights are the teacher's."""

    def __init__(self, model: Any, window: dict[str, Any]) -> None:
        config = model.config
        family = family_of(config)
        spec = Mixer(window=Window(**window), combine=Part(name="window_only")).model_dump()
        decoder = model.get_decoder()
        attention = [family.module(decoder, index) for index in range(config.num_hidden_layers)]
        self.layers, self.groups = len(attention), int(family.heads(None, config)[1])
        self.exact = [
            LinearizedAttention(module, family, config, index, spec, self.groups)
            for index, module in enumerate(attention)
        ]
        self.windowed = [
            LinearizedAttention(module, family, config, index, spec, 0) for index, module in enumerate(attention)
        ]

    def without(self, unit: int | None) -> frozenset[int]:
        """Return the KV heads that stay exact where a head, or the whole layer, does not."""
        return frozenset() if unit is None else frozenset(range(self.groups)) - {unit}

    @contextlib.contextmanager
    def student(self, model: Any, exact: dict[int, frozenset[int]]) -> Iterator[None]:
        """Let these layers of the model have these exact KV heads, all others on the window, for a while."""
        family, decoder = family_of(model.config), model.get_decoder()
        with contextlib.ExitStack() as stack:
            for layer, heads in exact.items():
                stand_in = _Candidates(self.exact[layer], self.windowed[layer], [heads])
                stack.enter_context(_forward_of(family.module(decoder, layer), stand_in.forward))
            yield


class _Candidates:
    """Stands in for a layer's attention: of C copies of B rows, copy c has the c-th set of KV heads exact."""

    def __init__(
        self, exact: LinearizedAttention, windowed: LinearizedAttention, sets: Sequence[frozenset[int]]
    ) -> None:
        self.exact, self.windowed, self.sets = exact, windowed, sets
        self.errors: list[tuple[float, float]] = []

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Return the candidates' outputs [C * B, T, D]; their squared errors and the target's square in `errors`."""
        x = hidden_states[: hidden_states.shape[0] // len(self.sets)]
        positions = None
        if position_embeddings is not None:
            positions = (position_embeddings[0][: x.shape[0]], position_embeddings[1][: x.shape[0]])
        kept = self.exact.heads(x, positions, SequenceContext())
        given = self.windowed.heads(x, positions, SequenceContext())
        groups = [head // self.exact.repeat for head in range(kept.shape[2])]
        masks = torch.tensor([[group in heads for group in groups] for heads in self.sets], device=x.device)
        mixed = [torch.where(mask[:, None], kept, given) for mask in masks]
        out: Tensor = self.exact.family.output(self.exact, torch.cat([kept, *mixed]))
        target, *made = out.float().chunk(len(self.sets) + 1)
        size = float(target.square().sum())
        self.errors = [(float((one - target).square().sum()), size) for one in made]
        return self.exact.family.finish(self.exact, out[x.shape[0] :], hidden_states), None


class _Batch:
    """Samples of one length, and what the teacher made of them."""

    def __init__(self, model: Any, samples: Sequence[tuple[Sample, bool]]) -> None:
        self.model, self.decoder = model, model.get_decoder()
        self.samples = [sample for sample, _ in samples]
        self.rows = len(samples)
        device = next(model.parameters()).device
        ids, mask = tensors(self.samples)
        first = min(len(sample.prompt_ids) for sample in self.samples) - 1
        prose = torch.linspace(ids.shape[1] // 8, first - 1, PROSE_PLACES).long().unique()
        places = torch.cat([prose, torch.arange(first, ids.shape[1] - 1)])
        self.prose = len(prose)
        self.prosaic = torch.tensor([is_prose for _, is_prose in samples], device=device)
        self.ids, self.places = ids.to(device), places.to(device)
        self.mask = mask[:, places].to(device)
        self.targets = self.ids[:, self.places + 1]
        self.inputs: list[Tensor] = []
        with contextlib.ExitStack() as stack:
            for layer in layers_of(model):
                hook = layer.register_forward_pre_hook(self._keep, with_kwargs=True)
                stack.callback(hook.remove)
            self.teacher_logits = self._logits(1)[0]

    def _keep(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.inputs.append(args[0] if args else kwargs["hidden_states"])

    def _logits(self, copies: int) -> Tensor:
        """Return the model's logits at the places, [copies, B, P, V] in fp32."""
        ids = self.ids.repeat(copies, 1)
        out: Tensor = self.model(input_ids=ids, use_cache=False, logits_to_keep=self.places).logits
        return out.float().view(copies, self.rows, *out.shape[1:])

    def candidates(
        self, attention: _Branches, layer: int, sets: Sequence[frozenset[int]]
    ) -> tuple[Tensor, list[tuple[float, float]]]:
        """Return the logits [C, B, P, V] with each set of KV heads of a layer exact, and their errors at the layer."""
        layers, family = layers_of(self.model), family_of(self.model.config)
        stand_in = _Candidates(attention.exact[layer], attention.windowed[layer], sets)
        states = self.inputs[layer].repeat(len(sets), 1, 1)
        with contextlib.ExitStack() as stack:
            for below in layers[:layer]:  # their result is known: pass it on
                stack.enter_context(_forward_of(below, lambda *args, **kwargs: family.layer_output(states)))
            stack.enter_context(_forward_of(family.module(self.decoder, layer), stand_in.forward))
            return self._logits(len(sets)), stand_in.errors

    def add(self, logits: Tensor, tally: _Tally) -> None:
        """Add one candidate's logits [B, P, V]."""
        scores = sample_scores(self.samples, logits[self.mask], self.targets[self.mask])
        tally.answers += [(one.log_prob, one.token_accuracy) for one in scores]
        if not self.prosaic.any():
            return
        log_q = logits[self.prosaic, : self.prose].log_softmax(-1)
        log_p = self.teacher_logits[self.prosaic, : self.prose].log_softmax(-1)
        targets = self.targets[self.prosaic, : self.prose]
        loss = -log_q.gather(-1, targets[..., None]).double().sum()
        kl = (log_p.exp() * (log_p - log_q)).double().sum()
        tally.prose.append((float(loss), float(kl), targets.numel()))


@contextlib.contextmanager
def _forward_of(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let another function be a module's forward while the context lasts; its attributes stay."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def _room(model: nn.Module, candidates: int) -> int:
    """Return how many tokens of samples leave all candidates of a layer room in a batch."""
    return TOKENS_PER_BATCH.get(next(model.parameters()).device.type, 8192) // candidates


def _batches(samples: Sequence[tuple[Sample, bool]], tokens: int) -> Iterator[list[tuple[Sample, bool]]]:
    """Yield samples of one length, as many as have so many tokens."""
    lengths = sorted({len(sample.prompt_ids) + len(sample.answer_ids) for sample, _ in samples})
    for length in lengths:
        same = [pair for pair in samples if len(pair[0].prompt_ids) + len(pair[0].answer_ids) == length]
        size = max(1, tokens // length)
        for indices in batches([sample for sample, _ in same], size):
            yield [same[index] for index in indices]


def _chunks(units: Sequence[int | None], rows: int) -> Iterator[Sequence[int | None]]:
    """Yield the candidates that run at once; a batch of several rows has room for all."""
    size = len(units) if rows > 1 else 16
    yield from (units[start : start + size] for start in range(0, len(units), size))
