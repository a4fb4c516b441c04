"""The saved model: a subclass of the teacher's own class whose parameters keep the teacher's names.

One implementation serves every family. `config.linearize` says what was replaced:
`{"mixer": the recipe's mixer, "layers": converted layers, "exact_heads": {layer: KV heads}, "model_type": the
teacher's}`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_MAPPING,
)

from linearize.cache import LinearizedCache
from linearize.errors import LinearizeError
from linearize.mixers.attention import LinearizedAttention
from linearize.mixers.context import default_positions, sequence_context, visible_mask
from linearize.registry import families

STATIC_CACHES = ("static", "hybrid", "sliding_window", "hybrid_chunked", "offloaded_static", "offloaded_hybrid")
FP32_MODULES = ("mixer.gate", "mixer.memory", "mixer.combine", "mixer.conv")


class Classes(NamedTuple):
    """The classes of one family: configuration, decoder, and decoder with a language-model head."""

    config: type
    base: type
    lm: type


class LinearizedBase:
    """Mixed into the teacher's decoder: works out padding and documents once, and brings the right cache."""

    _keep_in_fp32_modules_strict = FP32_MODULES
    config: Any

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        keep_cap(config)
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        replace_attention(self, config)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the decoder; arguments as in the teacher's class.

        Documents packed into one row are told apart by `position_ids` that restart or by `cu_seq_lens_q`.
        """
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        if tokens is None:
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if use_cache is None:
            use_cache = bool(self.config.use_cache) and not getattr(self, "gradient_checkpointing", False)
        if use_cache and past_key_values is None:
            past_key_values = LinearizedCache(self.config)
        if past_key_values is not None and not isinstance(past_key_values, LinearizedCache):
            raise LinearizeError(
                f"A linearized model cannot write into a {type(past_key_values).__name__}; pass past_key_values=None, "
                "or the cache that an earlier call returned."
            )
        past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        batch, length = tokens.shape[:2]
        ends = kwargs.get("cu_seq_lens_q")
        padding = two_dimensional(attention_mask, batch, length, position_ids, causal=True)
        context = sequence_context(batch, length, padding, position_ids, ends, past)
        if position_ids is None:
            position_ids = default_positions(batch, length, padding, ends, past)
        if len(self.config.linearize["layers"]) == self.config.num_hidden_layers:
            # No softmax layer reads a mask, and a 4-D mask passes through mask creation untouched.
            attention_mask = tokens.new_zeros(1, 1, 1, 1)
        elif context.starts is not None and past == 0 and not family_of(self.config).isolates_documents:
            attention_mask = softmax_mask(self.config, visible_mask(context, batch, length, True, tokens.device))
        hand_context(self, context)
        return super().forward(  # type: ignore[misc]
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            sequence_context=context,
            **kwargs,
        )


class LinearizedEncoder:
    """Mixed into the teacher's encoder: works out padding and documents once. There is no cache."""

    _keep_in_fp32_modules_strict = FP32_MODULES
    config: Any

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        replace_attention(self, config)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the encoder; arguments as in the teacher's class.

        Documents packed into one row are told apart by `position_ids` that restart.
        """
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        if tokens is None:
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        batch, length = tokens.shape[:2]
        padding = two_dimensional(attention_mask, batch, length, position_ids, causal=False)
        context = sequence_context(batch, length, padding, position_ids, kwargs.get("cu_seq_lens_q"))
        if len(self.config.linearize["layers"]) == self.config.num_hidden_layers:
            attention_mask = tokens.new_zeros(1, 1, 1, 1)  # nobody reads it
        elif context.starts is not None:
            attention_mask = softmax_mask(self.config, visible_mask(context, batch, length, False, tokens.device))
        return super().forward(  # type: ignore[misc]
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            sequence_context=context,
            **kwargs,
        )


class LinearizedMaskedLM:
    """Mixed into the teacher's masked language model."""

    _keep_in_fp32_modules_strict = FP32_MODULES
    config: Any

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        replace_attention(self, config)


class LinearizedLM:
    """Mixed into the teacher's causal language model."""

    _is_stateful = True
    _keep_in_fp32_modules_strict = FP32_MODULES
    config: Any

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        keep_cap(config)
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        replace_attention(self, config)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Bring our own cache; transformers must not build one from the configuration."""
        given = model_kwargs.get("past_key_values")
        if given is not None:
            given._is_user_defined = True
            return
        if generation_config.use_cache is False:
            return
        kind = generation_config.cache_implementation
        if kind is not None and kind != "dynamic" and kind not in STATIC_CACHES:
            raise ValueError(
                f"cache_implementation={kind!r} is not served by a linearized model; use 'dynamic' or 'static'."
            )
        places = kwargs.get("max_cache_length", args[-1] if args else None)
        model_kwargs["past_key_values"] = LinearizedCache(self.config, places if kind in STATIC_CACHES else None)

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
        """Leave the padding mask as it is: the decoder reads it."""
        return attention_mask


def keep_cap(config: Any) -> None:
    """Let layers that stay softmax keep the teacher's cap on scores, which SDPA does not have."""
    if getattr(config, "attn_logit_softcapping", None) and config._attn_implementation == "sdpa":
        config._attn_implementation = "eager"


def replace_attention(
    model: Any, config: Any, on_new: Callable[[int, LinearizedAttention], None] = lambda index, module: None
) -> dict[int, nn.Module]:
    """Put a `LinearizedAttention` in the place of each converted layer's attention.

    Args:
        model: a causal language model of a known family, weights or meta.
        config: carries `linearize`.
        on_new: called with each new module before the next is made.

    Returns:
        The attention modules that were replaced, by layer.
    """
    settings = config.linearize
    if settings is None:
        raise LinearizeError(
            f"This {type(config).__name__} has no `linearize` entry, so there is nothing to build; convert a teacher "
            "with `linearize.surgery.convert`, or load a folder that `linearize` wrote."
        )
    family = family_of(config)
    family.check(config)
    decoder = model.get_decoder()
    replaced, replacements = {}, {}
    for index in settings["layers"]:
        teacher = replaced[index] = family.module(decoder, index)
        exact = len(settings["exact_heads"].get(str(index), ()))
        like = next(teacher.parameters())
        new = LinearizedAttention(teacher, family, config, index, settings["mixer"], exact)
        if new.mixer is not None and like.device.type != "meta":
            new.mixer.to(device=like.device, dtype=like.dtype)
        replacements[index] = new.train(teacher.training)
        on_new(index, new)
    for index, new in replacements.items():
        family.replace(decoder, index, new)
    decoder.__class__ = classes_for(settings["model_type"]).base
    return replaced


def family_of(config: Any) -> Any:
    """Return the family of a teacher's or a converted model's configuration."""
    settings = getattr(config, "linearize", None)
    return families.get(settings["model_type"] if settings else config.model_type)


def layers_of(model: Any) -> Any:
    """Return the layers of a teacher or a converted model, in order."""
    return model.get_decoder().get_submodule(family_of(model.config).layers)


def two_dimensional(
    mask: Tensor | None, batch: int, length: int, position_ids: Tensor | None, causal: bool
) -> Tensor | None:
    """Return a mask of padding as it is, and None for a mask [B, 1, T, T] that says what `position_ids` say.

    Raises:
        ValueError: from what takes the mask on, where it says something else.
    """
    if mask is None or mask.dim() != 4 or position_ids is None:
        return mask
    context = sequence_context(batch, length, None, position_ids, None)
    told = mask if mask.dtype == torch.bool else mask == 0
    return None if torch.equal(told, visible_mask(context, batch, length, causal, mask.device)) else mask


def softmax_mask(config: Any, visible: Tensor) -> Tensor:
    """Return a mask [B, 1, T, T] in the form that the teacher's attention takes: bool, or added to the scores."""
    if config._attn_implementation != "eager":
        return visible
    dtype = getattr(config, "dtype", None) or torch.float32
    return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)


def packed_inputs(config: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the inputs of packed rows as a teacher or a student of this configuration needs them.

    Args:
        config: of either; a model of no known family is taken to keep documents apart.
        inputs: `input_ids` and `position_ids` [B, T] that count from 0 in each document, and what else is passed on.
    """
    settings = getattr(config, "linearize", None)
    model_type = settings["model_type"] if settings else config.model_type
    if model_type not in families:
        return inputs
    family = families.get(model_type)
    if family.isolates_documents:
        return inputs
    position_ids = inputs["position_ids"]
    batch, length = position_ids.shape
    context = sequence_context(batch, length, None, position_ids, None)
    visible = visible_mask(context, batch, length, family.causal, position_ids.device)
    position_ids = position_ids + family.first_position(config)
    return {**inputs, "position_ids": position_ids, "attention_mask": softmax_mask(config, visible)}


def hand_context(decoder: Any, context: Any) -> None:
    """Give the sequence context to the replaced attention of a decoder that does not hand on unknown arguments."""
    family = family_of(decoder.config)
    if not family.passes_context:
        for index in decoder.config.linearize["layers"]:
            family.module(decoder, index).context = context


_CLASSES: dict[str, Classes] = {}


def classes_for(model_type: str) -> Classes:
    """Return (made on first use) the linearized classes of the teacher's `model_type`."""
    if model_type in _CLASSES:
        return _CLASSES[model_type]
    causal = families.get(model_type).causal
    teacher_config = CONFIG_MAPPING[model_type]
    teacher_base = MODEL_MAPPING[teacher_config]
    teacher_lm = (MODEL_FOR_CAUSAL_LM_MAPPING if causal else MODEL_FOR_MASKED_LM_MAPPING)[teacher_config]
    kind = "ForCausalLM" if causal else "ForMaskedLM"
    stem = teacher_lm.__name__.removesuffix(kind).removesuffix("LMHeadModel")
    base_mixin, lm_mixin = (LinearizedBase, LinearizedLM) if causal else (LinearizedEncoder, LinearizedMaskedLM)
    module = {"__module__": __name__}
    config = type(
        f"Linearized{stem}Config",
        (teacher_config,),
        {
            **module,
            "model_type": f"linearized_{model_type}",
            "linearize": None,
            "__annotations__": {"linearize": dict[str, Any] | None},
        },
    )
    base = type(f"Linearized{stem}Model", (base_mixin, teacher_base), {**module, "config_class": config})
    lm = type(f"Linearized{stem}{kind}", (lm_mixin, teacher_lm), {**module, "config_class": config})
    _CLASSES[model_type] = Classes(config, base, lm)
    _record_hidden_states(base, teacher_base)
    # What lies in a checkpoint under other names than in the model: experts, GPT-NeoX's head.
    names = {
        model_type: f"linearized_{model_type}",
        teacher_base.__name__: base.__name__,
        teacher_lm.__name__: lm.__name__,
    }
    for name, ours in names.items():
        conversions = get_checkpoint_conversion_mapping(name)
        if conversions:
            register_checkpoint_conversion_mapping(ours, conversions, overwrite=True)
    globals().update({c.__name__: c for c in _CLASSES[model_type]})
    return _CLASSES[model_type]


def _record_hidden_states(base: type, teacher_base: Any) -> None:
    """Let `output_hidden_states` (and `output_router_logits`) work: transformers looks up by class what it records."""
    from transformers.utils import output_capturing

    kept = {key: what for key, what in (teacher_base._can_record_outputs or {}).items() if key != "attentions"}
    dict.__setitem__(output_capturing._CAN_RECORD_REGISTRY, str(base), kept)
    base._can_record_outputs = kept  # type: ignore[attr-defined]


def auto_name(model_type: str) -> str:
    """Return the name of transformers' Auto class that loads models of a family with their language-model head."""
    return "AutoModelForCausalLM" if families.get(model_type).causal else "AutoModelForMaskedLM"


def auto_class(model_type: str) -> Any:
    """Return the Auto class that `auto_name` names."""
    return getattr(transformers, auto_name(model_type))


def register_all() -> None:
    """Let transformers' Auto classes load linearized models of every family."""
    from transformers import AutoConfig, AutoModel

    for model_type in families.names():
        made = classes_for(model_type)
        AutoConfig.register(made.config.model_type, made.config, exist_ok=True)  # type: ignore[attr-defined]
        AutoModel.register(made.config, made.base, exist_ok=True)
        auto_class(model_type).register(made.config, made.lm, exist_ok=True)
