"""The saved model: a subclass of the teacher's own class whose parameters keep the teacher's names.

One implementation serves every family. `config.linearize` says what was replaced:
`{"mixer": the recipe's mixer, "layers": converted layers, "exact_heads": {layer: KV heads}, "model_type": the
teacher's}`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

from linearize.cache import LinearizedCache
from linearize.errors import LinearizeError
from linearize.mixers.attention import LinearizedAttention
from linearize.mixers.context import default_positions, sequence_context
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
        context = sequence_context(batch, length, attention_mask, position_ids, ends, past)
        if position_ids is None:
            position_ids = default_positions(batch, length, attention_mask, ends, past)
        if len(self.config.linearize["layers"]) == self.config.num_hidden_layers:
            # No softmax layer reads a mask, and a 4-D mask passes through mask creation untouched.
            attention_mask = tokens.new_zeros(1, 1, 1, 1)
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


class LinearizedLM:
    """Mixed into the teacher's causal language model."""

    _is_stateful = True
    _keep_in_fp32_modules_strict = FP32_MODULES
    config: Any

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
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


def replace_attention(model: Any, config: Any) -> dict[int, nn.Module]:
    """Put a `LinearizedAttention` in the place of each converted layer's attention.

    Args:
        model: a causal language model of a known family, weights or meta.
        config: carries `linearize`.

    Returns:
        The attention modules that were replaced, by layer.
    """
    settings = config.linearize
    if settings is None:
        raise LinearizeError(
            f"This {type(config).__name__} has no `linearize` entry, so there is nothing to build; convert a teacher "
            "with `linearize.surgery.convert`, or load a folder that `linearize` wrote."
        )
    family = families.get(settings["model_type"])
    decoder = model.get_decoder()
    replaced, replacements = {}, {}
    for index in settings["layers"]:
        layer = decoder.layers[index]
        exact = len(settings["exact_heads"].get(str(index), ()))
        replaced[index] = layer.self_attn
        like = next(layer.self_attn.parameters())
        new = LinearizedAttention(layer.self_attn, family, config, index, settings["mixer"], exact)
        if new.mixer is not None and like.device.type != "meta":
            new.mixer.to(device=like.device, dtype=like.dtype)
        replacements[index] = new.train(layer.training)
    for index, new in replacements.items():
        decoder.layers[index].self_attn = new
    decoder.__class__ = classes_for(settings["model_type"]).base
    return replaced


_CLASSES: dict[str, Classes] = {}


def classes_for(model_type: str) -> Classes:
    """Return (made on first use) the linearized classes of the teacher's `model_type`."""
    if model_type in _CLASSES:
        return _CLASSES[model_type]
    families.get(model_type)
    teacher_config = CONFIG_MAPPING[model_type]
    teacher_base, teacher_lm = MODEL_MAPPING[teacher_config], MODEL_FOR_CAUSAL_LM_MAPPING[teacher_config]
    stem = teacher_lm.__name__.removesuffix("ForCausalLM")
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
    base = type(f"Linearized{stem}Model", (LinearizedBase, teacher_base), {**module, "config_class": config})
    lm = type(f"Linearized{stem}ForCausalLM", (LinearizedLM, teacher_lm), {**module, "config_class": config})
    _CLASSES[model_type] = Classes(config, base, lm)
    _record_hidden_states(base, teacher_base)
    conversions = get_checkpoint_conversion_mapping(model_type)
    if conversions:  # experts lie in a checkpoint under other names than in the model
        register_checkpoint_conversion_mapping(f"linearized_{model_type}", conversions, overwrite=True)
    globals().update({c.__name__: c for c in _CLASSES[model_type]})
    return _CLASSES[model_type]


def _record_hidden_states(base: type, teacher_base: Any) -> None:
    """Let `output_hidden_states` (and `output_router_logits`) work: transformers looks up by class what it records."""
    from transformers.utils import output_capturing

    kept = {key: what for key, what in (teacher_base._can_record_outputs or {}).items() if key != "attentions"}
    dict.__setitem__(output_capturing._CAN_RECORD_REGISTRY, str(base), kept)
    base._can_record_outputs = kept  # type: ignore[attr-defined]


def register_all() -> None:
    """Let transformers' Auto classes load linearized models of every family."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    for model_type in families.names():
        made = classes_for(model_type)
        AutoConfig.register(made.config.model_type, made.config, exist_ok=True)  # type: ignore[attr-defined]
        AutoModel.register(made.config, made.base, exist_ok=True)
        AutoModelForCausalLM.register(made.config, made.lm, exist_ok=True)
