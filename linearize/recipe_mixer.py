"""The types of a recipe's `mixer`: five parts, the window and which layers have a memory."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


class Strict(BaseModel):
    """Base of all recipe types: unknown keys and numbers without end are rejected, assignments are validated."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, strict=True, allow_inf_nan=False)


class Part(BaseModel):
    """A mixer part by its registered name, with that part's options as further keys.

    In YAML `softmax` is short for `{name: softmax}`.
    """

    model_config = ConfigDict(extra="allow", strict=True)

    name: str

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


Size: TypeAlias = Annotated[int, Field(ge=1, le=2**20)]


def _share(value: Any) -> Any:
    """Return 0.1 for `10%`, and anything else as it is."""
    if isinstance(value, str) and value.endswith("%"):
        try:
            return float(value[:-1]) / 100
        except ValueError:
            return value
    return value


Share: TypeAlias = Annotated[float, BeforeValidator(_share), Field(gt=0, lt=1)]


class WindowBudget(Strict):
    """Windows of another size in each layer, as large as a cache budget allows, where the probe finds that it matters.

    Every layer begins with the smallest size; then, again and again, the layer and the larger size that win most for
    what they cost, as the probe measures one layer at a time: of the answers' log-probability that recall loses, and of
    the divergence from the teacher on prose.

    Args:
        cache: the largest share of the teacher's bf16 KV cache that the whole cache may have at 8,192 tokens of one
            row, in the run's dtype; `10%` or 0.1. An `exact_heads.cache` below it is what the whole cache may have
            with the smallest windows, so that the heads come first. All of it is spent, where sizes allow.
        among: the sizes.
    """

    cache: Share
    among: list[Size] = Field([64, 128, 256, 512], min_length=2)

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        if self.among != sorted(set(self.among)):
            raise ValueError(f"`among` must name sizes from small to large, each once, got {self.among}")
        return self


class Window(Strict):
    """A causal softmax window of `size` tokens (its own included) and the first `sinks` tokens of a document.

    Args:
        size: of every layer's; or a list with one size for each layer of the model; or `{cache: 5%}`, by which a probe
            chooses them.
        kind: `sliding`, or `terrace`: blocks of `size` tokens, of which a token sees its own up to itself and the one
            before (LoLCATs as it trains). A terrace has no sinks.
    """

    size: Size | Annotated[list[Size], Field(min_length=1)] | WindowBudget = 64
    sinks: int = Field(0, ge=0, le=2**12)
    kind: Literal["sliding", "terrace"] = "sliding"

    @model_validator(mode="after")
    def _check_kind(self) -> Self:
        if self.kind == "terrace" and self.sinks:
            raise ValueError("`kind: terrace` has no sinks; set `sinks: 0`, or `kind: sliding`")
        return self

    @property
    def sizes(self) -> list[int]:
        """The sizes that layers have or may have, from small to large."""
        if isinstance(self.size, WindowBudget):
            return self.size.among
        return sorted(set(self.size)) if isinstance(self.size, list) else [self.size]


class Conv(Strict):
    """A causal depthwise convolution on what the memory reads. In YAML `4` is short for `{taps: 4}`.

    Args:
        taps: tokens that it mixes, its own included.
        inputs: `qkv`, the queries, keys and values by the teacher's heads; or `v`, the values alone by the memory's
            heads (Mamba-1).
        activation: behind it; `silu` in Mamba.
        identity: start as the identity. Mamba's start is random.
    """

    taps: int = Field(4, ge=2, le=2**8)
    inputs: Literal["qkv", "v"] = "qkv"
    activation: Literal["none", "silu"] = "none"
    identity: bool = True

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        return {"taps": value} if isinstance(value, int) else value


# What the probe measures where a layer or a KV head gives up exact softmax (`linearize.probe`).
Measure: TypeAlias = Literal["recall", "kl", "transfer", "halo"]
HeadMeasure: TypeAlias = Measure | Literal["joint"]


class MemoryLayers(Strict):
    """How many layers have a memory; a probe chooses them.

    Args:
        keep: share of the converted layers; at least one has a memory.
        by: the probe's measure of what a layer loses on the window alone.
    """

    keep: float = Field(gt=0, lt=1)
    by: Measure = "recall"

    def count(self, layers: int) -> int:
        """Return how many of so many converted layers have a memory."""
        return min(layers, max(1, round(self.keep * layers)))


NonNegative: TypeAlias = Annotated[int, Field(ge=0, strict=True)]


class Mixer(Strict):
    """What replaces softmax attention: five parts (feature map, gate, memory, window, combine) and switches.

    Args:
        rotary: the memory sees queries and keys after the rotary embedding (true, LoLCATs), before it (false, Liger),
            or their features are what is rotated (`features`, SUPRA).
        normalize: divide the memory's output by the sum of its weights.
        overlap: the memory also covers the tokens inside the window; if false, window and memory are disjoint.
        output_norm: norm per head on the memory's output: RMS norm with a learned scale that the heads share (true) or
            that each has its own of (`per_head`, Mamba-2), or group norm without one (`group`, SUPRA).
        output_gate: multiply by a learned gate of the layer's input: the mixer's output by its sigmoid, started open
            (true), or the memory's, before the norm, by its SiLU (`silu`, Mamba).
        conv: a causal depthwise convolution on the q, k and v that the memory reads.
        k_map_heads: the memory, with its key feature map, gate and state, is one per KV head, or one per query head
            (LoLCATs and The Mamba in the Llama to the letter).
        memory_layers: which of the converted layers have a memory: all, a list, or as many as a probe chooses,
            `{keep: 0.2, by: recall}`. The others have the window alone.
        cache_dtype: `mxint8` rounds the keys (behind the rotary embedding) and values of converted layers, of the
            window, its sinks, `memory: retain` and exact heads, to eight bits with a power of two for each block of 32
            (Microscaling Data Formats, arXiv:2310.10537), in training, evaluation and decoding alike, the gradient
            straight through, so that the cache holds 33 bytes of 32 numbers. States stay in fp32.
    """

    feature_map: Part = Part(name="identity")
    gate: Part = Part(name="none")
    memory: Part = Part(name="additive")
    window: Window | None = Window()
    combine: Part = Part(name="learned")
    rotary: bool | Literal["features"] = False
    normalize: bool = False
    overlap: bool = True
    output_norm: bool | Literal["group", "per_head"] = False
    output_gate: bool | Literal["silu"] = False
    conv: Conv | None = None
    k_map_heads: Literal["kv", "query"] = "kv"
    memory_layers: Literal["all"] | Annotated[list[NonNegative], Field(min_length=1)] | MemoryLayers = "all"
    cache_dtype: Literal["model", "mxint8"] = "model"
