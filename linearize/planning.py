"""Recipe x model config -> Plan: what a run will do, worked out on the meta device before any weight is loaded."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from linearize.errors import LinearizeError
from linearize.eval.memory import format_bytes
from linearize.modeling import auto_class
from linearize.modeling.classes import family_of
from linearize.recipe import TRAINED_PROJECTIONS, AnyStage, Distill, Recipe, Transfer
from linearize.registry import families
from linearize.stages.adapters import attention_targets, lora_targets

if TYPE_CHECKING:
    from rich.console import RenderableType
    from transformers import PretrainedConfig

CONTEXTS = (1024, 8192, 65536)
# AdamW in mixed precision: fp32 master copy, gradient and two moments for each parameter that trains.
TRAIN_BYTES = 16
INNER_SIZES = ("intermediate_size", "ffn_hidden_size", "n_inner")
SMALL_FILES = 64 * 2**20


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
        name: `transfer`, `finetune` or `distill`.
        tokens: the budget.
        steps: optimizer steps that it takes.
        trained: parameters.
        memory: estimated peak bytes, weights included.
    """

    name: str
    tokens: int
    steps: int
    trained: int
    memory: int


@dataclass(frozen=True)
class Plan:
    """What a run does. `linearize plan` prints it, and the run carries out the same object.

    Attributes:
        recipe: with all overrides applied.
        model: the teacher's name.
        layers: one entry a layer.
        stages: in order.
        parameters: of the teacher.
        mixer_parameters: new ones.
        memory: estimated peak bytes over the stages.
        disk: bytes that the run and its output folder need.
        cache: tokens of context -> bytes of the teacher's and of the student's cache, for one row; empty for encoders.
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

    def render(self) -> RenderableType:
        """Return the plan as rich tables."""
        from rich.console import Group

        tables = [_layer_table(self), _stage_table(self)]
        return Group(_summary(self), *tables, *([_cache_table(self)] if self.cache else []))


def make_plan(
    recipe: Recipe, config: PretrainedConfig, *, model: str = "teacher", dtype: torch.dtype | None = None
) -> Plan:
    """Check a recipe against a model and work out what a run will do.

    Args:
        recipe: with all overrides applied.
        config: the teacher's.
        model: the teacher's name, for the printed plan.
        dtype: of the weights; the config's own, else fp32.

    Raises:
        LinearizeError: a mixer part, a layer, a head or a LoRA target does not exist, rows are longer than the
            teacher's context, or a stage has nothing to train.
    """
    family = families.get(config.model_type)
    family.check(config)
    _check_direction(recipe, config)
    _check_length(recipe, config)
    _check_layers(recipe, config)
    _check_distill(recipe, config)
    dtype = dtype or getattr(config, "dtype", None) or torch.float32
    with torch.device("meta"):
        network = auto_class(config.model_type).from_config(type(config).from_dict(config.to_dict()), dtype=dtype)
        parameters = _count(network.parameters())
        mixers = _convert(recipe, network)
    stages = tuple(_stage(recipe, i, network, mixers, dtype) for i in range(len(recipe.stages)))
    weights = sum(p.numel() * p.element_size() for p in network.parameters())
    checkpoint = max((stage.trained for stage in stages), default=0) * 12
    return Plan(
        recipe=recipe,
        model=model,
        layers=tuple(_layers(recipe, config)),
        stages=stages,
        parameters=parameters,
        mixer_parameters=_count(p for mixer in mixers.values() for p in mixer.parameters()),
        memory=max([stage.memory for stage in stages], default=weights),
        disk=weights + 2 * checkpoint + SMALL_FILES,
        cache={c: _cache_bytes(recipe, config, mixers, c, dtype) for c in CONTEXTS} if family.causal else {},
    )


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
    count, groups = config.num_hidden_layers, family_of(config).heads(None, config)[1]
    converted = converted_layers(recipe, config)
    for layer, head in recipe.exact_heads:
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


def _check_distill(recipe: Recipe, config: PretrainedConfig) -> None:
    """Raise where a stage before a distill stage trains adapters on layers that its teacher and the student share."""
    shared = recipe.mixer is not None and len(converted_layers(recipe, config)) < config.num_hidden_layers
    adapted = False
    for index, stage in enumerate(recipe.stages):
        if isinstance(stage, Distill) and adapted and shared:
            raise LinearizeError(
                f"`stages.{index}` (distill) stands behind LoRA on all layers, but some of this model's layers stay "
                "softmax, and those its teacher shares; train LoRA behind the distill stage, or in it."
            )
        adapted |= not isinstance(stage, Transfer) and stage.train == "lora"


def _convert(recipe: Recipe, network: Any) -> dict[int, nn.Module]:
    """Convert the meta model and return each converted layer's mixer."""
    from linearize.surgery import convert

    if recipe.mixer is None:
        return {}
    layers = converted_layers(recipe, network.config)
    surgery = convert(network, recipe.mixer.model_dump(), layers, list(recipe.exact_heads))
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
        memory = "" if mixer.combine.name == "window_only" else _memory_words(recipe)
        window, sinks = (mixer.window.size, mixer.window.sinks) if mixer.window else (0, 0)
        exact = tuple(sorted(head for layer, head in recipe.exact_heads if layer == index))
        if len(exact) == family_of(config).heads(None, config)[1]:
            window, sinks, memory = 0, 0, ""
        yield LayerPlan(index, "converted", exact, window, sinks, memory)


def _memory_words(recipe: Recipe) -> str:
    assert recipe.mixer is not None
    parts = (recipe.mixer.feature_map, recipe.mixer.gate, recipe.mixer.memory)
    return ", ".join(part.name for part in parts)


def _stage(recipe: Recipe, index: int, network: Any, mixers: dict[int, nn.Module], dtype: torch.dtype) -> StagePlan:
    stage = recipe.stages[index]
    trained = _trained(stage, network, mixers)
    if not trained:
        raise LinearizeError(
            f"`stages.{index}` ({stage.stage}) trains nothing: its `train: {stage.train}` finds no parameter in this "
            "mixer. Drop the stage, or train LoRA deltas (`train: qkvo`)."
        )
    length = recipe.data.length
    steps = stage.steps(length)
    weights = sum(p.numel() * p.element_size() for p in network.parameters())
    rows = (stage.micro_batch or stage.batch) * length
    activations = rows * _activation_bytes(stage, network.config, dtype)
    return StagePlan(stage.stage, stage.tokens, steps, trained, weights + trained * TRAIN_BYTES + activations)


def _trained(stage: AnyStage, network: Any, mixers: dict[int, nn.Module]) -> int:
    """Return how many parameters a stage trains."""
    own = _count(p for mixer in mixers.values() for p in mixer.parameters())
    decoder = network.get_decoder()
    if isinstance(stage, Transfer):
        family = family_of(network.config)
        targets = attention_targets(family, TRAINED_PROJECTIONS[stage.train])
        layers = [family.module(decoder, index) for index in mixers]
        return own + sum(_lora_size(layer.get_submodule(name), stage.lora.r) for layer in layers for name in targets)
    if stage.train == "full":
        return _count(network.parameters())
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


def _activation_bytes(stage: AnyStage, config: Any, dtype: torch.dtype) -> int:
    """Return the estimated bytes that one token needs for the backward pass."""
    inner = next((getattr(config, name) for name in INNER_SIZES if getattr(config, name, None)), 4 * config.hidden_size)
    # Norms, residuals and the attention's inputs and outputs, then the MLP's gate, up, activation and product.
    layer = int((13 * config.hidden_size + 4 * inner) * dtype.itemsize)
    if isinstance(stage, Transfer):
        return layer
    vectors = config.num_hidden_layers * config.hidden_size * dtype.itemsize
    kept = vectors + layer if stage.gradient_checkpointing else config.num_hidden_layers * layer
    logits = config.vocab_size * (dtype.itemsize + 2 * torch.float32.itemsize)
    return int(kept + logits)


def _cache_bytes(
    recipe: Recipe, config: Any, mixers: dict[int, nn.Module], context: int, dtype: torch.dtype
) -> tuple[int, int]:
    """Return the bytes of the teacher's and the student's cache after `context` tokens of one row."""
    family = family_of(config)
    _, groups, head_dim = family.heads(None, config)
    pair = 2 * head_dim * dtype.itemsize
    exact: dict[int, int] = {}
    for layer, _ in recipe.exact_heads:
        exact[layer] = exact.get(layer, 0) + 1
    converted = set(mixers) | set(exact)
    sizes: dict[int, int] = {}
    teacher = student = 0
    for layer in range(config.num_hidden_layers):
        softmax = pair * family.cached_heads(config) * _reach(config, layer, context)
        teacher += softmax
        if layer not in converted:
            student += softmax
            continue
        kept = exact.get(layer, 0)
        if kept not in sizes and layer in mixers:
            sizes[kept] = _mixer_cache_bytes(mixers[layer], config, groups - kept, head_dim, dtype)
        student += sizes.get(kept, 0) + pair * kept * context
    return teacher, student


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
        f"memory about {format_bytes(plan.memory)} (estimate), disk {format_bytes(plan.disk)}",
        f"data {plan.recipe.data.source}, rows of {plan.recipe.data.length} tokens",
    ]
    return Text("\n".join(lines))


def _layer_table(plan: Plan) -> RenderableType:
    from rich.table import Table

    table = Table("layer", "attention", "exact KV heads", "window", "sinks", "memory")
    for layer in plan.layers:
        heads = " ".join(map(str, layer.exact_heads))
        table.add_row(
            str(layer.index), layer.kind, heads, str(layer.window or ""), str(layer.sinks or ""), layer.memory
        )
    return table


def _stage_table(plan: Plan) -> RenderableType:
    from rich.table import Table

    table = Table("stage", "tokens", "steps", "trained parameters", "memory (estimate)")
    for stage in plan.stages:
        table.add_row(
            stage.name, f"{stage.tokens:,}", f"{stage.steps:,}", f"{stage.trained:,}", format_bytes(stage.memory)
        )
    return table


def _cache_table(plan: Plan) -> RenderableType:
    from rich.table import Table

    table = Table("context", "teacher's KV cache", "student's cache")
    for context, (teacher, student) in plan.cache.items():
        table.add_row(f"{context // 1024}K", format_bytes(teacher), format_bytes(student))
    return table
