"""Swap a pretrained model's softmax attention for mixers, in place, and back."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

import linearize.modeling  # noqa: F401  (registers the classes that a converted model becomes)
from linearize.errors import LinearizeError
from linearize.mixers.attention import LinearizedAttention, sharing
from linearize.mixers.check import check_mixer
from linearize.modeling.classes import classes_for, family_of, replace_attention
from linearize.registry import families


@dataclass
class Surgery:
    """A converted model and what it takes to undo it.

    Attributes:
        model: the converted model; the same object that was given.
        teachers: the replaced attention modules, by layer; their weights are the converted model's own.
        teacher_classes: what model, decoder and configuration were before.
    """

    model: Any
    teachers: dict[int, nn.Module]
    teacher_classes: tuple[type, type, type]
    _orders: dict[int, list[int]] = field(default_factory=dict)
    _waiting: dict[int, Any] = field(default_factory=dict)

    @contextlib.contextmanager
    def installed(self, attention: Mapping[int, nn.Module]) -> Iterator[None]:
        """Run the decoder as the teacher's class, with other modules in the place of the converted attention.

        Args:
            attention: by layer; with `teachers`, the decoder is the teacher.
        """
        decoder = self.model.get_decoder()
        linearized = type(decoder)
        family = family_of(self.model.config)
        students = {index: family.module(decoder, index) for index in attention}
        decoder.__class__ = self.teacher_classes[1]
        for index, module in attention.items():
            family.replace(decoder, index, module)
        try:
            yield
        finally:
            decoder.__class__ = linearized
            for index, student in students.items():
                family.replace(decoder, index, student)

    def separate(self, names: Iterable[str]) -> None:
        """Give the student copies of the projections that it shares with the teacher and that are about to change.

        Args:
            names: entries of the model's state dict that will be written.
        """
        decoder = self.model.get_decoder()
        family = family_of(self.model.config)
        changed = [f".{name}" for name in names]
        for index, teacher in self.teachers.items():
            student = family.module(decoder, index)
            place = f".{family.layers}.{index}.{family.attention}"
            for name, child in teacher.named_modules():
                leaf = not any(True for _ in child.children())
                if leaf and student.get_submodule(name) is child and any(f"{place}.{name}." in key for key in changed):
                    parent, _, last = name.rpartition(".")
                    setattr(student.get_submodule(parent), last, copy.deepcopy(child))

    @property
    def arranged(self) -> list[int]:
        """The layers whose KV heads stand in another order than the teacher's."""
        return [layer for layer, order in self._orders.items() if order != sorted(order)]

    def arrange(self, layer: int) -> None:
        """Put the KV heads of a layer, whose teacher's weights were just loaded, into the student's order."""
        if layer in self._orders:
            family = family_of(self.model.config)
            heads, _, head_dim = family.heads(self.teachers[layer], self.model.config)
            family.permute(self.teachers[layer], self._orders[layer], heads, head_dim)

    def beside(self) -> list[nn.Module]:
        """Return the attention modules that wait beside the model, in which another stands in their place."""
        return [*self.teachers.values(), *self._waiting.values()]

    def only(self, layers: Iterable[int]) -> Surgery:
        """Return the surgery as if it had converted these layers alone; the model is the same object."""
        chosen = {index: teacher for index, teacher in self.teachers.items() if index in set(layers)}
        return Surgery(self.model, chosen, self.teacher_classes)

    def activate(self, layers: Iterable[int]) -> None:
        """Let the model run these of its converted layers as converted, and the others as the teacher does, for now.

        A layer that joins takes over the teacher's projections as they are by then.
        """
        decoder, active = self.model.get_decoder(), set(layers)
        family = family_of(self.model.config)
        for index, teacher in self.teachers.items():
            now = family.module(decoder, index)
            if index not in active and now is not teacher:
                self._waiting[index] = now
                family.replace(decoder, index, teacher)
            elif index in active and now is teacher:
                family.replace(decoder, index, self._join(self._waiting.pop(index), teacher))
        self.model.config.linearize["layers"] = sorted(active & self.teachers.keys())

    @staticmethod
    def _join(student: Any, teacher: nn.Module) -> Any:
        for name, child in teacher.named_children():
            setattr(student, name, sharing(child))
        like = next(teacher.parameters())
        if student.mixer is not None:
            student.mixer.to(device=like.device, dtype=like.dtype)
        return student.train(teacher.training)

    def undo(self) -> Any:
        """Put the teacher's attention back and return the model, bit-equal to what it was."""
        model, decoder = self.model, self.model.get_decoder()
        family = family_of(model.config)
        for index, teacher in self.teachers.items():
            if index in self._orders:
                order = self._orders[index]
                heads, _, head_dim = family.heads(teacher, model.config)
                back = sorted(range(len(order)), key=order.__getitem__)
                family.permute(teacher, back, heads, head_dim)
            family.replace(decoder, index, teacher)
        model.__class__, decoder.__class__, model.config.__class__ = self.teacher_classes
        del model.config.linearize
        return model


def convert(
    model: Any,
    mixer: dict[str, Any],
    layers: list[int] | None = None,
    exact_heads: list[tuple[int, int]] | None = None,
    on_new: Callable[[int, LinearizedAttention], None] = lambda index, module: None,
) -> Surgery:
    """Replace attention on `layers` of a causal language model, in place.

    KV heads are reordered inside a layer so that its exact heads come first.

    Args:
        model: a teacher of a known family with its weights loaded.
        mixer: the recipe's `mixer` as plain data.
        layers: which layers; by default those that the family names (all, but Gemma's local layers stay).
        exact_heads: (layer, KV head) pairs that keep full softmax attention.
        on_new: called with each layer and its new module, in order, before the next is made.

    Returns:
        The surgery; `.model` is the converted model, `.undo()` reverts it.

    Raises:
        LinearizeError: the model is of no known family or converted already, the mixer does not fit, or layers or
            heads do not exist.
    """
    config = model.config
    if getattr(config, "linearize", None):
        raise LinearizeError("This model is linearized already; convert its teacher instead.")
    family = families.get(config.model_type)
    family.check(config)
    check_mixer(mixer, causal=family.causal)
    decoder = model.get_decoder()
    count, groups = config.num_hidden_layers, family.heads(None, config)[1]
    chosen = family.convertible(config) if layers is None else sorted(set(layers))
    for layer in chosen:
        if not 0 <= layer < count:
            raise LinearizeError(f"`layers` names layer {layer}; the model has layers 0 to {count - 1}.")
    sizes = (mixer.get("window") or {}).get("size")
    if isinstance(sizes, list) and len(sizes) != count:
        raise LinearizeError(f"`mixer.window.size` names {len(sizes)} sizes; the model has {count} layers.")
    named = mixer.get("memory_layers", "all")
    memories = named if isinstance(named, list) else []
    wrong = [layer for layer in memories if layer not in chosen]
    if wrong:
        raise LinearizeError(
            f"`mixer.memory_layers` names layer {wrong[0]}, which is not converted (converted: {chosen})."
        )
    exact: dict[int, list[int]] = {}
    for layer, head in exact_heads or []:
        if layer not in chosen:
            raise LinearizeError(f"exact_heads names layer {layer}, which is not converted (converted: {chosen}).")
        if not 0 <= head < groups:
            raise LinearizeError(f"exact_heads names KV head {head} of layer {layer}; a layer has {groups}.")
        exact.setdefault(layer, []).append(head)
    whole = [layer for layer in memories if len(set(exact.get(layer, ()))) == groups]
    if whole:
        raise LinearizeError(
            f"`mixer.memory_layers` names layer {whole[0]}, whose heads are all exact: nothing is left to it."
        )
    before = (type(model), type(decoder), type(config))
    model_type = config.model_type
    made = classes_for(model_type)
    config.__class__ = made.config
    config.linearize = {
        "model_type": model_type,
        "mixer": mixer,
        "layers": chosen,
        "exact_heads": {str(layer): sorted(set(kept)) for layer, kept in exact.items()},
    }
    try:
        teachers = replace_attention(model, config, on_new)
    except Exception:  # the model is still the teacher; only its configuration is not
        config.__class__ = before[2]
        del config.linearize
        raise
    model.__class__ = made.lm
    orders = {layer: sorted(set(kept)) + [g for g in range(groups) if g not in kept] for layer, kept in exact.items()}
    surgery = Surgery(model, teachers, before, orders)
    for layer in orders:
        surgery.arrange(layer)
    return surgery
