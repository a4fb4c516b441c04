"""Recipe x model config -> Plan: what a run will do, worked out on the meta device before any weight is loaded."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from linearize.errors import LinearizeError
from linearize.estimates import LAUNCHES, Weights, logit_bytes, stage_memory, token_bytes
from linearize.eval.memory import format_bytes
from linearize.head_scores import ProbeScores, choose_heads, choose_layers, choose_memories, choose_windows
from linearize.kernels.microscaling import stored_bytes
from linearize.modeling.classes import family_of, layers_of
from linearize.recipe import ExactHeads, Probe, Recipe, SoftmaxLayers
from linearize.recipe_mixer import MemoryLayers, WindowBudget
from linearize.recipe_stages import TRAINED_PROJECTIONS, AnyStage, Distill, Transfer
from linearize.registry import families
from linearize.stages.adapters import attention_targets, lora_targets
from linearize.stages.retention import QUERIES, labelled_rows
from linearize.stages.speed import pays
from linearize.stream_plan import available_memory, check_streamed, transfer_alone
from linearize.weights import empty_model

if TYPE_CHECKING:
    from rich.console import RenderableType
    from transformers import PretrainedConfig

CONTEXTS = (1024, 8192, 65536)
BUDGET_CONTEXT = 8192  # where a share of the teacher's cache is taken
SMALL_FILES = 64 * 2**20
STATE_LIMIT = 2**30  # bytes, of one layer's memory for one row
LENGTH_BYTES = 8  # of `exact_length`, in a layer with exact heads, for one row


@dataclass(frozen=True)
class LayerPlan:
    """One layer: `softmax` where it stays as it is, else `converted`.

    Attributes:
        index: of the layer.
        kind: `softmax` or `converted`.
        exact_heads: KV heads that keep full softmax.
        window: tokens of the sliding window, 0 without one.
        sinks: first tokens that stay visible.
        memory: the parts of the memory in words, or an empty string.
    """

    index: int
    kind: str
    exact_heads: tuple[int, ...] = ()
    window: int = 0
    sinks: int = 0
    memory: str = ""


@dataclass(frozen=True)
class StagePlan:
    """One stage: its tokens and optimizer steps, and how many parameters train.

    Attributes:
        name: of the kind of stage.
        tokens: of all steps, which are whole batches of rows.
        steps: optimizer steps that it takes.
        trained: parameters.
        memory: estimated peak bytes, weights included, a copy of the teacher's where one is loaded beside them,
            and the hidden states that `order: layerwise` keeps on the CPU.
        launches: estimated peak bytes on each GPU by the way of launching; None where a stage is not launched so.
    """

    name: str
    tokens: int
    steps: int
    trained: int
    memory: int
    launches: dict[str, int | None] = field(default_factory=dict)


@dataclass(frozen=True)
class StreamPlan:
    """How a transfer that reads its teacher layer by layer goes.

    Attributes:
        teacher: most bytes of the teacher's tensors at once: its embedding or head, or a block of layers.
        states: bytes of the hidden states of all rows.
        on_disk: the states lie in files of the run's folder, not in memory.
        layers: which train; None for all.
    """

    teacher: int
    states: int
    on_disk: bool
    layers: range | None = None


@dataclass(frozen=True)
class Plan:
    """What a run does. `linearize plan` prints it, and the run carries out the same object.

    Attributes:
        recipe: with all overrides applied; `probed` while layers or heads are still to be chosen.
        model: the teacher's name.
        layers: one entry a layer; layers that a probe is to choose are shown evenly spread, heads not at all.
        stages: in order.
        parameters: of the teacher.
        mixer_parameters: new ones.
        memory: estimated peak bytes over the stages.
        disk: bytes that the run and its output folder need.
        cache: tokens of context -> bytes of the teacher's and of the student's cache, for one row; empty for encoders.
        exact_heads: how many KV heads of converted layers keep full softmax.
        cache_share: the student's cache over the teacher's in bf16, at 8,192 tokens; 1 for encoders.
        stream: how the transfer is streamed; None where the whole teacher is loaded.
    """

    recipe: Recipe
    model: str
    layers: tuple[LayerPlan, ...]
    stages: tuple[StagePlan, ...]
    parameters: int
    mixer_parameters: int
    memory: int
    disk: int
    cache: dict[int, tuple[int, int]]
    exact_heads: int = 0
    cache_share: float = 1.0
    stream: StreamPlan | None = None

    def render(self, speeds: Mapping[str, float] | None = None) -> RenderableType:
        """Return the plan as rich tables; `speeds` are measured tokens a second by kind of stage."""
        from rich.console import Group

        tables = [_layer_table(self), _stage_table(self, speeds or {}), *([_launch_table(self)] if self.stages else [])]
        return Group(_summary(self), *tables, *([_cache_table(self)] if self.cache else []))


def make_plan(
    recipe: Recipe,
    config: PretrainedConfig,
    *,
    model: str = "teacher",
    dtype: torch.dtype | None = None,
    stream: bool = False,
    part: range | None = None,
) -> Plan:
    """Check a recipe against a model and work out what a run will do.

    Args:
        recipe: with all overrides applied.
        config: the teacher's.
        model: the teacher's name, for the printed plan.
        dtype: of the weights; the config's own, else fp32.
        stream: transfer reads the teacher layer by layer.
        part: the layers that a part of a streamed run trains.

    Raises:
        LinearizeError: a mixer part, a layer, a head or a LoRA target does not exist, rows are longer than the
            teacher's context, or a stage has nothing to train.
    """
    family = families.get(config.model_type)
    family.check(config)
    _check_direction(recipe, config)
    _check_length(recipe, config)
    dtype = dtype or getattr(config, "dtype", None) or torch.float32
    asked, recipe = recipe, place_heads(recipe, config, dtype)
    _check_layers(recipe, config)
    if stream:
        check_streamed(asked, part, config.num_hidden_layers)
    network = empty_model(config, dtype)
    with torch.device("meta"):
        parameters = _count(network.parameters())
        mixers = _convert(recipe, network)
    if asked.window_budget is None:
        _check_stage_windows(recipe, mixers)
        _check_labels(recipe, mixers)
    streamed = _stream_plan(recipe, network, part) if stream else None
    stages = tuple(_stage(recipe, i, network, mixers, dtype, streamed) for i in range(len(recipe.schedule())))
    weights = sum(p.numel() * p.element_size() for p in network.parameters())
    checkpoint = max((stage.trained for stage in stages), default=0) * 12
    answers = sum(_kept_bytes(stage, stage.row_length(recipe.data.length)) for _, stage in recipe.schedule())
    ended = sum(_ended_bytes(recipe, i, network, mixers) for i in range(len(recipe.schedule())))
    states = streamed.states if streamed is not None and streamed.on_disk else 0
    undecided = isinstance(asked.exact_heads, ExactHeads)
    shown = recipe.model_copy(update={"exact_heads": []}) if undecided else recipe
    shown = shown if asked.memory_choice is None else shown.with_memories([])
    return Plan(
        recipe=asked,
        model=model,
        layers=tuple(_layers(shown, config)),
        stages=stages,
        parameters=parameters,
        mixer_parameters=_count(p for mixer in mixers.values() for p in mixer.parameters()),
        memory=max([stage.memory for stage in stages], default=weights),
        disk=weights + 2 * checkpoint + ended + answers + SMALL_FILES + states,
        cache={c: _cache_bytes(recipe, config, mixers, c, dtype) for c in CONTEXTS} if family.causal else {},
        exact_heads=len(_pairs(recipe)),
        cache_share=_cache_share(recipe, config, mixers, dtype) if family.causal else 1.0,
        stream=streamed,
    )


def resolve_heads(recipe: Recipe, scores: ProbeScores, config: PretrainedConfig, dtype: torch.dtype) -> Recipe:
    """Return the recipe with the layers and heads that the probe chose, as lists.

    Raises:
        LinearizeError: the scores are another model's, or the recipe's numbers do not fit the model.
    """
    scores.check(config, recipe, recipe.probe.file or "The probe")
    recipe = choose_layers(recipe, scores, family_of(config).convertible(config))
    converted = converted_layers(recipe, config)
    count = count_heads(choose_memories(recipe, scores, converted), config, dtype)
    chosen = _with_heads(recipe, scores, count, converted, _groups(config))
    budget = recipe.exact_heads.cache if isinstance(recipe.exact_heads, ExactHeads) else None
    while budget is not None and count and _share_of(chosen, config, dtype, _pairs(chosen)) > budget:
        count -= 1  # heads of a layer with a memory cost less than `count_heads` takes them to
        chosen = _with_heads(recipe, scores, count, converted, _groups(config))
    losses = {int(size): values for size, values in scores.losses.items()}
    return _fill_windows(chosen, config, dtype, lambda tokens: choose_windows(losses, tokens, converted))


def _with_heads(recipe: Recipe, scores: ProbeScores, count: int, converted: list[int], groups: int) -> Recipe:
    """Return the recipe with so many exact heads, and its memories in layers of which some heads are not exact."""
    chosen = choose_heads(recipe, scores, count, converted)
    return choose_memories(chosen, scores, converted, _exact_layers(_pairs(chosen), groups))


def _exact_layers(pairs: list[tuple[int, int]], groups: int) -> set[int]:
    """Return the layers whose heads are all exact, which leaves nothing to a memory."""
    kept = [layer for layer, _ in pairs]
    return {layer for layer in kept if kept.count(layer) == groups}


def _fill_windows(
    recipe: Recipe, config: PretrainedConfig, dtype: torch.dtype, choose: Callable[[int], list[int]]
) -> Recipe:
    """Return the recipe, its exact heads a list, with windows as large as its budget allows.

    Args:
        recipe: with or without a budget for windows.
        config: the teacher's.
        dtype: of the cache.
        choose: returns the layers' sizes, which add up to no more than the tokens that it is given.

    Raises:
        LinearizeError: the smallest windows are beyond the budget.
    """
    budget = recipe.window_budget
    if budget is None:
        return recipe
    layers = len(converted_layers(recipe, config))
    small, large = budget.among[0], budget.among[-1]
    least, most = (_share_of(recipe.with_windows(size), config, dtype, _pairs(recipe)) for size in (small, large))
    if least > budget.cache:
        raise LinearizeError(
            f"`mixer.window.size.cache` is {budget.cache:.1%} of the teacher's cache at {BUDGET_CONTEXT:,} tokens, and "
            f"with windows of {small} tokens this recipe's has {least:.1%} already, in "
            f"{str(dtype).removeprefix('torch.')}. Keep fewer exact heads, or take a larger share."
        )
    # The share grows evenly with the sizes, but for layers of which some heads are exact: those have fewer windows.
    tokens = small * layers
    if most > least:
        tokens += int((budget.cache - least) / (most - least) * (large - small) * layers)
    while True:
        filled = recipe.with_windows(choose(tokens))
        if tokens <= small * layers or _share_of(filled, config, dtype, _pairs(recipe)) <= budget.cache:
            return filled
        tokens = max(small * layers, tokens - small)


def leaves_a_choice(recipe: Recipe, config: PretrainedConfig, dtype: torch.dtype) -> bool:
    """Return whether a probe has anything to choose: layers, windows, or some but not all of the heads."""
    if recipe.window_budget is not None or recipe.memory_choice is not None:
        return True
    if not isinstance(recipe.exact_heads, ExactHeads):
        return recipe.probed
    heads = len(converted_layers(recipe, config)) * _groups(config)
    by_layer = isinstance(recipe.layers, SoftmaxLayers) and recipe.layers.by is not None
    return by_layer or 0 < count_heads(recipe, config, dtype) < heads


def place_heads(recipe: Recipe, config: PretrainedConfig, dtype: torch.dtype) -> Recipe:
    """Return the recipe with as many exact heads and memories as it will have, in places that stand in for those of the
    probe, and windows of one size in the place of those that a budget allows.
    """
    converted = converted_layers(recipe, config)
    choice = recipe.memory_choice
    if choice is not None:
        recipe = recipe.with_memories(converted[-choice.count(len(converted)) :])
    if isinstance(recipe.exact_heads, ExactHeads):
        places = [(layer, head) for head in range(_groups(config)) for layer in converted]
        chosen = places[: count_heads(recipe, config, dtype)]
        recipe = recipe.model_copy(update={"exact_heads": chosen, "probe": Probe()})
    if choice is not None:
        exact = _exact_layers(_pairs(recipe), _groups(config))
        left = [layer for layer in converted if layer not in exact]
        recipe = recipe.with_memories(left[-choice.count(len(converted)) :])
    count = config.num_hidden_layers
    return _fill_windows(recipe, config, dtype, lambda tokens: [tokens // max(1, len(converted))] * count)


def count_heads(recipe: Recipe, config: PretrainedConfig, dtype: torch.dtype) -> int:
    """Return how many KV heads a recipe keeps exact; a cache budget buys as many as fit.

    Raises:
        LinearizeError: there are fewer heads than it keeps, or the rest of the cache is beyond the budget.
    """
    asked = recipe.exact_heads
    if not isinstance(asked, ExactHeads):
        return len(asked)
    layers = converted_layers(recipe, config)
    heads = len(layers) * _groups(config)
    if asked.keep is not None:
        if asked.keep > heads:
            raise LinearizeError(f"`exact_heads.keep` is {asked.keep}; the converted layers have {heads} KV heads.")
        return asked.keep
    assert asked.cache is not None
    none, one = (_share_of(recipe, config, dtype, pairs) for pairs in ([], [(layers[0], 0)]))
    if none > asked.cache:
        rest = config.num_hidden_layers - len(layers)
        raise LinearizeError(
            f"`exact_heads.cache` is {asked.cache:.1%} of the teacher's cache at {BUDGET_CONTEXT:,} tokens, and "
            f"without any exact head this recipe's has {none:.1%} already, in {str(dtype).removeprefix('torch.')}"
            + (f", with the {rest} layers that stay as they are" if rest else "")
            + ". Take a smaller window or memory, or a larger share."
        )
    return heads if one <= none else min(heads, int((asked.cache - none) / (one - none) + 1e-9))


def _share_of(recipe: Recipe, config: PretrainedConfig, dtype: torch.dtype, pairs: list[tuple[int, int]]) -> float:
    """Return the share of the cache with these exact heads."""
    recipe = recipe.model_copy(update={"exact_heads": pairs})
    if recipe.mixer is not None and isinstance(recipe.mixer.memory_layers, list):
        exact = _exact_layers(pairs, _groups(config))
        recipe = recipe.with_memories([layer for layer in recipe.mixer.memory_layers if layer not in exact])
    network = empty_model(config, dtype)
    with torch.device("meta"):
        mixers = _convert(recipe, network)
    return _cache_share(recipe, config, mixers, dtype)


def _cache_share(recipe: Recipe, config: Any, mixers: dict[int, nn.Module], dtype: torch.dtype) -> float:
    """Return the cache's bytes over those of the teacher's in bf16."""
    teacher, student = _cache_bytes(recipe, config, mixers, BUDGET_CONTEXT, dtype)
    return student * dtype.itemsize / (teacher * torch.bfloat16.itemsize)


def _groups(config: Any) -> int:
    """The KV heads of a layer."""
    return int(family_of(config).heads(None, config)[1])


def _pairs(recipe: Recipe) -> list[tuple[int, int]]:
    """The recipe's exact heads, which are a list by now."""
    assert isinstance(recipe.exact_heads, list)
    return recipe.exact_heads


def check_disk(folder: Path, needed: int) -> None:
    """Raise unless the disk that will hold `folder` has `needed` bytes free.

    Raises:
        LinearizeError: it has not.
    """
    existing = next(parent for parent in [folder.absolute(), *folder.absolute().parents] if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise LinearizeError(
            f"The run needs about {format_bytes(needed)} on the disk of {existing}, with {format_bytes(free)} free. "
            "Free some space, or give another folder with --output."
        )


def _check_length(recipe: Recipe, config: PretrainedConfig) -> None:
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None:
        longest -= family_of(config).first_position(config)
    if longest is not None and recipe.data.length > longest:
        raise LinearizeError(
            f"`data.length` is {recipe.data.length} tokens, but the teacher's context ends at {longest} "
            f"(max_position_embeddings): it cannot teach what lies behind. Set data.length={longest} or less."
        )


def _check_stage_windows(recipe: Recipe, mixers: dict[int, Any]) -> None:
    """Raise where a stage's windows are those that all layers have anyway, as where the teacher's own is short."""
    for index, stage in enumerate(recipe.stages):
        size = stage.window
        if size is not None and all(_window_of(mixer) == mixer.bounded(size) for mixer in mixers.values()):
            raise LinearizeError(
                f"`stages.{index}.window` is {size}, and all windows of this model are as long without it (the "
                "teacher's own may be short), so that it has no effect. Take another size, or drop it."
            )


def _check_labels(recipe: Recipe, mixers: dict[int, Any]) -> None:
    """Raise where the rows of a transfer are too short for any token to have a label of what is worth keeping."""
    for index, stage in enumerate(recipe.stages):
        if not isinstance(stage, Transfer):
            continue
        rows, size = stage.row_length(recipe.data.length), stage.window
        windows = [(mixer, _window_of(mixer) if size is None else mixer.bounded(size)) for mixer in mixers.values()]
        least = max((labelled_rows(mixer, window) for mixer, window in windows), default=0)
        if rows < least:
            raise LinearizeError(
                f"`stages.{index}` learns what is worth keeping where {QUERIES} queries stand behind a token's window; "
                f"rows of {rows} tokens have none. Rows of {least} tokens and more do: `data.length`, or "
                f"`stages.{index}.length`."
            )


def _check_direction(recipe: Recipe, config: PretrainedConfig) -> None:
    """Raise where a recipe for decoders meets an encoder, or the other way about."""
    if recipe.causal == families.get(config.model_type).causal:
        return
    if recipe.causal:
        raise LinearizeError(
            f"Recipe {recipe.name!r} is causal, and {config.model_type} is an encoder, whose tokens see later ones as "
            "well; use a recipe with `causal: false`, such as hedgehog-encoder, or a decoder."
        )
    raise LinearizeError(
        f"Recipe {recipe.name!r} is for encoders (`causal: false`), and {config.model_type} is a decoder, whose tokens "
        "must not see later ones; use a causal recipe, such as liger, or an encoder such as BERT."
    )


def converted_layers(recipe: Recipe, config: Any) -> list[int]:
    """Return the layers of a model that a recipe converts.

    A list is taken as it is; otherwise the choice is among the layers that the family offers: all, but Gemma's local
    layers stay softmax.
    """
    if recipe.mixer is None or isinstance(recipe.layers, list):
        return recipe.converted_layers(config.num_hidden_layers)
    offered = family_of(config).convertible(config)
    if not offered:
        raise LinearizeError(
            "All layers of this model are local (a sliding window), and those stay softmax unless they are named; name "
            "some, as in layers=[0,1]."
        )
    return [offered[place] for place in recipe.converted_layers(len(offered))]


def _check_layers(recipe: Recipe, config: PretrainedConfig) -> None:
    count, groups = config.num_hidden_layers, _groups(config)
    converted = converted_layers(recipe, config)
    for layer, head in _pairs(recipe):
        if layer >= count:
            raise LinearizeError(f"`exact_heads` names layer {layer}; the model has layers 0 to {count - 1}.")
        if head >= groups:
            raise LinearizeError(
                f"`exact_heads` names KV head {head} of layer {layer}; the model has KV heads 0 to {groups - 1}."
            )
        if layer not in converted:
            raise LinearizeError(
                f"`exact_heads` names KV head {head} of layer {layer}, which `layers` keeps as softmax altogether."
            )


def needs_teacher_copy(recipe: Recipe, config: Any, index: int) -> bool:
    """Return whether stage `index` of the schedule needs the teacher anew; see `Recipe.needs_teacher_copy`."""
    return recipe.needs_teacher_copy(index, len(converted_layers(recipe, config)) == config.num_hidden_layers)


def _convert(recipe: Recipe, network: Any) -> dict[int, nn.Module]:
    """Convert the meta model and return each converted layer's mixer."""
    from linearize.surgery import convert

    if recipe.mixer is None:
        return {}
    layers = converted_layers(recipe, network.config)
    surgery = convert(network, recipe.mixer.model_dump(), layers, _pairs(recipe))
    decoder = network.get_decoder()
    family = family_of(network.config)
    found = {index: family.module(decoder, index).mixer for index in surgery.teachers}
    return {index: mixer for index, mixer in found.items() if mixer is not None}


def _layers(recipe: Recipe, config: PretrainedConfig) -> Iterator[LayerPlan]:
    mixer = recipe.mixer
    converted = converted_layers(recipe, config)
    for index in range(config.num_hidden_layers):
        if mixer is None or index not in converted:
            yield LayerPlan(index, "softmax")
            continue
        assert not isinstance(mixer.memory_layers, MemoryLayers)  # place_heads has given it a list
        remembers = mixer.memory_layers == "all" or index in mixer.memory_layers
        memory = _memory_words(recipe) if remembers and mixer.combine.name != "window_only" else ""
        window, sinks = 0, 0
        if mixer.window is not None:
            size = mixer.window.size
            assert not isinstance(size, WindowBudget)  # place_heads has given it a size
            window, sinks = (size[index] if isinstance(size, list) else size), mixer.window.sinks
        exact = tuple(sorted(head for layer, head in _pairs(recipe) if layer == index))
        if len(exact) == _groups(config):
            window, sinks, memory = 0, 0, ""
        yield LayerPlan(index, "converted", exact, window, sinks, memory)


def _memory_words(recipe: Recipe) -> str:
    assert recipe.mixer is not None
    parts = (recipe.mixer.feature_map, recipe.mixer.gate, recipe.mixer.memory)
    return ", ".join(part.name for part in parts)


def _stream_plan(recipe: Recipe, network: Any, part: range | None) -> StreamPlan:
    """How a streamed transfer goes, by the converted meta model."""
    stage, config, dtype = recipe.stages[0], network.config, network.dtype
    assert isinstance(stage, Transfer)
    embedding, *sizes = (_bytes(module) for module in [network.get_input_embeddings(), *layers_of(network)])
    head = _bytes(network) - _bytes(network.get_decoder())
    blocks = [sum(sizes[i : i + stage.block]) for i in range(0, len(sizes), stage.block)]
    length = stage.row_length(recipe.data.length)
    tokens = stage.trained_tokens(length) + (0 if part else 3 * recipe.data.held_out) * recipe.data.length
    states = tokens * config.hidden_size * dtype.itemsize
    return StreamPlan(max(embedding, head, *blocks), states, states > available_memory() // 2, part)


def _bytes(module: nn.Module) -> int:
    """The bytes of a module's parameters, a mixer's left out."""
    return sum(p.numel() * p.element_size() for name, p in module.named_parameters() if ".mixer." not in name)


def _stage(
    recipe: Recipe,
    index: int,
    network: Any,
    mixers: dict[int, nn.Module],
    dtype: torch.dtype,
    stream: StreamPlan | None = None,
) -> StagePlan:
    turn, stage = recipe.schedule()[index]
    if recipe.mixer is not None:
        mixers = _joined(recipe, network.config, mixers, range(turn if isinstance(stage, Transfer) else 0, turn + 1))
    trained = _trained(stage, network, mixers)
    if not trained:
        raise LinearizeError(
            f"`stages.{index}` ({stage.stage}) trains nothing: its `train: {stage.train}` finds no parameter in this "
            "mixer. Drop the stage, or train LoRA deltas (`train: qkvo`)."
        )
    if isinstance(stage, Transfer) and stage.maps:
        from linearize.stages.maps import check_map

        for mixer in mixers.values():
            check_map(mixer)
    length = stage.row_length(recipe.data.length)
    steps = stage.steps(length)
    weights = Weights.of(network, layers_of(network))
    rows = (stage.micro_batch or stage.batch) * length
    passes = steps * -(-stage.batch * length // rows)
    watched = isinstance(stage, Distill) and stage.hidden > 0  # such layers are not compiled, nor are sharded ones
    compiled = pays(network.get_decoder(), 0 if watched else passes, stage.tokens)
    eager, each = (
        max(token_bytes(stage, network.config, dtype, mixer, fast) for mixer in (*mixers.values(), None))
        for fast in (False, compiled)
    )
    logits = logit_bytes(stage, network.config, dtype, rows)
    copied = needs_teacher_copy(recipe, network.config, index) and getattr(stage, "teacher_device", None) is None
    launches = {
        launch: stage_memory(stage, weights, trained, tokens, length, logits=logits, copied=copied, launch=launch)
        for launch in LAUNCHES
        for tokens in [eager if launch.startswith("FSDP2") else each]
    }
    memory = launches["streamed" if stream is not None and isinstance(stage, Transfer) else "one GPU"] or 0
    if isinstance(stage, Transfer):
        memory += _transfer_bytes(stage, network.config, dtype, rows, length, streamed=stream is not None)
    return StagePlan(stage.stage, stage.trained_tokens(length), steps, trained, memory, launches)


def _joined(recipe: Recipe, config: Any, mixers: dict[int, nn.Module], turns: range) -> dict[int, nn.Module]:
    """Return the mixers of the layers that join in these rounds."""
    layers = converted_layers(recipe, config)
    joined = [layer for turn in turns for layer in recipe.joining(layers, turn)]
    return {layer: mixer for layer, mixer in mixers.items() if layer in joined}


def _trained(stage: AnyStage, network: Any, mixers: dict[int, nn.Module]) -> int:
    """Return how many parameters a stage trains."""
    own = _count(p for mixer in mixers.values() for p in mixer.parameters())
    family, decoder = family_of(network.config), network.get_decoder()
    layers = [family.module(decoder, index) for index in mixers]
    if isinstance(stage, Transfer):
        targets = attention_targets(family, TRAINED_PROJECTIONS[stage.train])
        return own + sum(_lora_size(layer.get_submodule(name), stage.lora.r) for layer in layers for name in targets)
    if stage.train == "full":
        return _count(network.parameters())
    if stage.train == "attention":
        return _count(p for layer in layers for p in layer.parameters())
    if stage.train == "mixer":
        return own
    return _finetune_lora_size(stage, network) + (own if stage.train_mixer else 0)


def _finetune_lora_size(stage: Any, network: Any) -> int:
    targets = lora_targets(network, stage.lora.targets)
    matched = [module for name, module in network.named_modules() if name.endswith(tuple(f".{t}" for t in targets))]
    return sum(_lora_size(module, stage.lora.r) for module in matched)


def _lora_size(module: Any, r: int) -> int:
    """Return the parameters of an adapter: of rank r on each side of a weight [out, in], or transposed as in GPT-2."""
    return int(r * sum(module.weight.shape))


def _transfer_bytes(stage: Transfer, config: Any, dtype: torch.dtype, tokens: int, length: int, streamed: bool) -> int:
    """Return the estimated bytes of attention maps, and of the hidden states of all rows that `layerwise` keeps."""
    # Both maps, what the softmax and the logarithm keep, and their gradients, in fp32.
    maps = 6 * 4 * tokens * length * config.num_attention_heads if stage.maps else 0
    kept = stage.trained_tokens(length) * config.hidden_size * dtype.itemsize
    return maps + (kept if stage.order == "layerwise" and not streamed else 0)


def _kept_bytes(stage: AnyStage, length: int) -> int:
    """Return the most bytes that the teacher's likeliest tokens take on the disk: index and log-probability each."""
    if not isinstance(stage, Distill) or not stage.cache:
        return 0
    return stage.trained_tokens(length) * 8 * ((stage.top_k or 0) + 1)


def _ended_bytes(recipe: Recipe, index: int, network: Any, mixers: dict[int, nn.Module]) -> int:
    """Return the bytes of what stage `index` changes, which stay on the disk until the run is published."""
    turn, stage = recipe.schedule()[index]
    if recipe.mixer is not None:
        mixers = _joined(recipe, network.config, mixers, range(turn + 1))
    own = sum(_bytes(mixer) for mixer in mixers.values())
    family, decoder = family_of(network.config), network.get_decoder()
    if isinstance(stage, Transfer):
        targets = [f"{family.attention}.{t}" for t in attention_targets(family, TRAINED_PROJECTIONS[stage.train])]
    elif stage.train == "full":
        return own + _bytes(network)
    elif stage.train == "attention":
        return sum(_bytes(family.module(decoder, layer)) for layer in mixers)
    else:
        targets = lora_targets(network, stage.lora.targets) if stage.train == "lora" else []
        own = own if stage.train_mixer else 0
    named = network.named_parameters()
    adapted = [p for name, p in named if any(f".{target}." in name for target in targets)]  # in all layers
    return own + int(sum(p.numel() * p.element_size() for p in adapted))


def _cache_bytes(
    recipe: Recipe, config: Any, mixers: dict[int, nn.Module], context: int, dtype: torch.dtype
) -> tuple[int, int]:
    """Return the bytes of the teacher's and the student's cache after `context` tokens of one row."""
    family = family_of(config)
    _, groups, head_dim = family.heads(None, config)
    pair = 2 * head_dim * dtype.itemsize
    microscaled = recipe.mixer is not None and recipe.mixer.cache_dtype == "mxint8"
    exact_pair = 2 * stored_bytes(head_dim) if microscaled else pair
    exact: dict[int, int] = {}
    for layer, _ in _pairs(recipe):
        exact[layer] = exact.get(layer, 0) + 1
    converted = set(mixers) | set(exact)
    sizes: dict[tuple[int, int, bool], int] = {}
    teacher = student = 0
    for layer in range(config.num_hidden_layers):
        softmax = pair * family.cached_heads(config) * _reach(config, layer, context)
        teacher += softmax
        if layer not in converted:
            student += softmax
            continue
        kept = exact.get(layer, 0)
        mixed = 0
        if layer in mixers:
            mixer: Any = mixers[layer]
            like = kept, mixer.window, mixer.memory is None
            if like not in sizes:
                sizes[like] = _mixer_cache_bytes(mixer, config, groups - kept, head_dim, dtype)
            mixed = sizes[like]
        student += mixed + exact_pair * kept * context + (LENGTH_BYTES if kept else 0)
    return teacher, student


def _window_of(mixer: Any) -> int:
    """Return a mixer's window."""
    return int(mixer.window)


def _reach(config: Any, layer: int, context: int) -> int:
    """Return how many tokens the teacher's own cache of a layer keeps."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if window is None or (kinds is not None and kinds[layer] != "sliding_attention"):
        return context
    return min(context, int(window))


def _mixer_cache_bytes(mixer: nn.Module, config: Any, groups: int, head_dim: int, dtype: torch.dtype) -> int:
    """Return the bytes of what a mixer caches, read off one token that a blank copy of it has seen."""
    from linearize.mixers.context import SequenceContext

    memory: Any = mixer.memory
    state = {} if memory is None else memory.initial_state(1, torch.empty(0, dtype=dtype, device="meta"))
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    if size > STATE_LIMIT:
        raise LinearizeError(
            f"`mixer.memory` has a state of {format_bytes(size)} for a layer and a row; expected at most "
            f"{format_bytes(STATE_LIMIT)}. Lower the options that set its size."
        )
    all_heads, all_groups, _ = family_of(config).heads(None, config)
    heads = groups * all_heads // all_groups
    with torch.device("cpu"), torch.no_grad():
        blank = copy.deepcopy(mixer).to_empty(device="cpu")
        x = torch.zeros(1, 1, config.hidden_size, dtype=dtype)
        q = torch.zeros(1, 1, heads, head_dim, dtype=dtype)
        k = torch.zeros(1, 1, groups, head_dim, dtype=dtype)
        cache: dict[str, Tensor] = {}
        blank(x, (q, k), (q, k), k, SequenceContext(), cache)
    return sum(tensor.numel() * tensor.element_size() for tensor in cache.values())


def _count(parameters: Iterator[Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _summary(plan: Plan) -> RenderableType:
    from rich.text import Text

    converted = sum(layer.kind == "converted" for layer in plan.layers)
    lines = [
        f"{plan.model} with recipe {plan.recipe.name}: {len(plan.layers)} layers, {converted} converted",
        f"parameters {plan.parameters:,} + {plan.mixer_parameters:,} in the mixers",
        *_exact_words(plan),
        f"memory about {format_bytes(plan.memory)} (estimate), disk {format_bytes(plan.disk)}",
        f"data {plan.recipe.data.source}, rows of {plan.recipe.data.length} tokens",
        *_stream_words(plan),
    ]
    return Text("\n".join(lines))


def _stream_words(plan: Plan) -> Iterator[str]:
    """How the transfer is streamed, and what that leaves to the whole model."""
    if plan.stream is None:
        return
    layers = plan.stream.layers
    which = "" if layers is None else f" of layers {layers.start} to {layers.stop - 1} (a part for `linearize merge`)"
    where = "in files of the run's folder" if plan.stream.on_disk else "in memory"
    yield (
        f"transfer{which} is streamed: at most {format_bytes(plan.stream.teacher)} of the teacher at once, "
        f"{format_bytes(plan.stream.states)} of hidden states {where}"
    )
    later = [stage.name for stage in plan.stages[1:]]
    if later:
        yield f"behind it, {', '.join(later)} load the whole model; for transfer alone: '{transfer_alone(plan.recipe)}'"


def _exact_words(plan: Plan) -> Iterator[str]:
    """What keeps full softmax inside converted layers, who chooses it, and what the cache comes to."""
    recipe = plan.recipe
    if plan.exact_heads or isinstance(recipe.exact_heads, ExactHeads):
        by = f", chosen by {recipe.exact_heads.by}" if isinstance(recipe.exact_heads, ExactHeads) else ""
        cache = f"; cache {plan.cache_share:.1%} of the teacher's in bf16 at 8K" if plan.cache else ""
        yield f"exact KV heads {plan.exact_heads}{by}{cache}"
    if recipe.memory_choice is not None:
        choice = recipe.memory_choice
        yield f"a memory in {choice.keep:.0%} of the converted layers, chosen by {choice.by}"
    if recipe.probed:
        yield "a probe of the teacher chooses before surgery (`linearize probe` alone; then probe.file=.../probe.json)"


def _layer_table(plan: Plan) -> RenderableType:
    from rich.table import Table

    table = Table("layer", "attention", "exact KV heads", "window", "sinks", "memory")
    for layer in plan.layers:
        heads = " ".join(map(str, layer.exact_heads))
        table.add_row(
            str(layer.index), layer.kind, heads, str(layer.window or ""), str(layer.sinks or ""), layer.memory
        )
    return table


def _stage_table(plan: Plan, speeds: Mapping[str, float]) -> RenderableType:
    from rich.table import Table

    table = Table("stage", "tokens", "steps", "trained parameters", "memory (estimate)")
    if speeds:
        table.add_column("time at the speed given")
    for stage in plan.stages:
        speed = speeds.get(stage.name)
        time = [] if not speeds else ["-" if speed is None else _hours(stage.tokens / speed)]
        numbers = (f"{number:,}" for number in (stage.tokens, stage.steps, stage.trained))
        table.add_row(stage.name, *numbers, format_bytes(stage.memory), *time)
    return table


def _hours(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes else f"{seconds:.0f} s"


def _launch_table(plan: Plan) -> RenderableType:
    from rich.table import Table

    table = Table("memory of each GPU (estimate)", *LAUNCHES)
    for stage in plan.stages:
        sizes = [stage.launches.get(launch) for launch in LAUNCHES]
        table.add_row(stage.name, *("-" if size is None else format_bytes(size) for size in sizes))
    return table


def _cache_table(plan: Plan) -> RenderableType:
    from rich.table import Table

    table = Table("context", "teacher's KV cache", "student's cache")
    for context, (teacher, student) in plan.cache.items():
        table.add_row(f"{context // 1024}K", format_bytes(teacher), format_bytes(student))
    return table
