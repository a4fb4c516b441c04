"""The recipe: which mixer replaces attention, where, and which stages recover the quality.

A recipe is the same object whether it comes from YAML or from code. Unknown keys are errors, and a recipe never names a
model. Mixer parts are checked against their registered classes by `linearize.mixers.check_mixer`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Strict(BaseModel):
    """Base of all recipe types: unknown keys are rejected, assignments are validated."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, strict=True)


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


class Window(Strict):
    """A causal sliding softmax window of `size` tokens (its own included) and the first `sinks` tokens of a document."""

    size: int = Field(64, ge=1)
    sinks: int = Field(0, ge=0)


class Mixer(Strict):
    """What replaces softmax attention: five parts and four switches (design: feature map, gate, memory, window, combine).

    Args:
        rotary: the memory sees queries and keys after the rotary embedding (LoLCATs) or before it (Liger).
        normalize: divide the memory's output by the sum of its weights.
        overlap: the memory also covers the tokens inside the window; if false, window and memory are disjoint.
        output_norm: RMS norm per head on the memory's output.
        output_gate: multiply the mixer's output by a learned gate of the layer's input.
    """

    feature_map: Part = Part(name="identity")
    gate: Part = Part(name="none")
    memory: Part = Part(name="additive")
    window: Window | None = Window()
    combine: Part = Part(name="learned")
    rotary: bool = False
    normalize: bool = False
    overlap: bool = True
    output_norm: bool = False
    output_gate: bool = False


class Optimizer(Strict):
    """AdamW and its schedule. `warmup` and the cosine are fractions of the stage's steps."""

    lr: float = Field(1e-3, gt=0)
    schedule: Literal["cosine", "plateau", "constant"] = "cosine"
    warmup: float = Field(0.05, ge=0, lt=1)
    min_lr: float = Field(0.0, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float | None = Field(1.0, gt=0)


class Lora(Strict):
    """Low-rank adapters (peft). `targets` are module names; one that matches nothing is an error."""

    r: int = Field(8, ge=1)
    alpha: float = Field(16, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: list[str] = ["q_proj", "k_proj", "v_proj", "o_proj"]


class Stage(Strict):
    """What every stage has: its token budget (trained tokens), its rows per optimizer step, its optimizer."""

    tokens: int = Field(1_000_000, ge=1)
    batch: int = Field(8, ge=1)
    micro_batch: int | None = Field(None, ge=1)
    optimizer: Optimizer = Optimizer()


class Transfer(Stage):
    """Attention transfer: each mixer learns its own layer's attention output, layers isolated from each other.

    Args:
        train: `mixer` trains the mixer's own parameters; `qk` and `qkvo` train LoRA deltas that the mixer alone sees, too.
        target: compare before or after the output projection.
        loss: squared error, as it is or divided by the target's mean square.
        scale: factor on the loss (LoLCATs: 1000).
    """

    stage: Literal["transfer"] = "transfer"
    train: Literal["mixer", "qk", "qkvo"] = "mixer"
    target: Literal["before_o_proj", "after_o_proj"] = "before_o_proj"
    loss: Literal["mse", "normalized_mse"] = "normalized_mse"
    scale: float = Field(1.0, gt=0)
    lora: Lora = Lora()


class Finetune(Stage):
    """Next-token cross-entropy with LoRA adapters (merged at the end) or on all parameters.

    Args:
        train: `lora` or `full`.
        train_mixer: the mixers' own parameters train too.
        gradient_checkpointing: recompute activations in the backward pass; changes memory only.
    """

    stage: Literal["finetune"] = "finetune"
    train: Literal["lora", "full"] = "lora"
    train_mixer: bool = False
    lora: Lora = Lora()
    gradient_checkpointing: bool = False


AnyStage = Annotated[Transfer | Finetune, Field(discriminator="stage")]


class Data(Strict):
    """Where the text comes from and how it becomes rows.

    Args:
        source: `builtin`, a local file or folder, or a hub id; a list mixes sources in order.
        format: `text` rows, `chat` (the teacher's chat template), `alpaca` (instruction, input, output), or found out.
        loss: train on all tokens or on the responses alone.
        length: tokens a row.
        held_out: rows kept for evaluation.
        shuffle_seed: order of the rows; the run's seed where it is not given.
    """

    source: str | list[str] = "builtin"
    split: str = "train"
    format: Literal["auto", "text", "chat", "alpaca"] = "auto"
    loss: Literal["all", "response"] = "all"
    length: int = Field(1024, ge=8)
    held_out: int = Field(32, ge=1)
    streaming: bool = False


class Quick(Strict):
    """What `--quick` changes, so that the whole recipe runs on a CPU in minutes: builtin data and these sizes."""

    tokens: int = Field(40_000, ge=1)
    length: int = Field(512, ge=8)
    batch: int = Field(2, ge=1)
    held_out: int = Field(8, ge=1)


class Recipe(Strict):
    """A method of linearization.

    Args:
        name: what `--recipe` takes.
        mixer: what replaces attention; null leaves the teacher as it is (the softmax control).
        layers: which layers are converted.
        exact_heads: (layer, KV head) pairs that keep full softmax attention and a growing cache.
        stages: what recovers the quality, in order.
    """

    name: str
    description: str = ""
    paper: str | None = None
    mixer: Mixer | None = Mixer()
    layers: Literal["all"] | list[int] = "all"
    exact_heads: list[tuple[int, int]] = []
    stages: list[AnyStage] = []
    data: Data = Data()
    quick: Quick = Quick()
