"""The types of a recipe's `stages`: what each trains, on how many tokens, with which optimizer and loss."""

from __future__ import annotations

from typing import Annotated, Literal, Self, TypeAlias

from pydantic import Field, model_validator

from linearize.recipe_mixer import Strict


class Optimizer(Strict):
    """AdamW and its schedule. `warmup` and the cosine are fractions of the stage's steps.

    Args:
        lr: learning rate, 1 at most.
        mixer_lr: learning rate of the mixers' own parameters, on the same schedule; `lr` then serves all others.
        schedule: `plateau` lowers the rate tenfold where the held-out loss stays, down to `min_lr`.
        clip: largest norm of the gradients; null leaves them.
    """

    lr: float = Field(1e-3, gt=0, le=1)
    mixer_lr: float | None = Field(None, gt=0, le=1)
    schedule: Literal["cosine", "plateau", "constant"] = "cosine"
    warmup: float = Field(0.05, ge=0, lt=1)
    min_lr: float = Field(0.0, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    betas: Annotated[tuple[float, float], Field(strict=False)] = (0.9, 0.999)
    clip: float | None = Field(1.0, gt=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name, rate in (("lr", self.lr), ("mixer_lr", self.mixer_lr)):
            if rate is not None and self.min_lr > rate:
                raise ValueError(f"min_lr ({self.min_lr:g}) is above {name} ({rate:g})")
        if self.schedule == "constant" and self.min_lr:
            raise ValueError("`min_lr` has no effect with `schedule: constant`, which stays at `lr`; drop it")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must lie in [0, 1), got {list(self.betas)}")
        return self


class Lora(Strict):
    """Low-rank adapters (peft). `targets` are module names; one that matches nothing is an error."""

    r: int = Field(8, ge=1)
    alpha: float = Field(16, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: list[str] = Field(["q_proj", "k_proj", "v_proj", "o_proj"], min_length=1)


class Stage(Strict):
    """What every stage has: its token budget (trained tokens), its rows per optimizer step, its optimizer.

    Args:
        length: tokens a row where that is less than `data.length`, which it divides: the rows are cut. So a recipe can
            spend its last tokens on longer rows than its first.
        window: every sliding window is so many tokens long while the stage trains and measures its own held-out loss;
            behind it they are as the mixer says. With less, what lies farther back has to go through exact heads or
            the memory, so that they learn to carry it; with as much as a row, heads are softmax over all of it.
    """

    tokens: int = Field(1_000_000, ge=1)
    batch: int = Field(8, ge=1)
    length: int | None = Field(None, ge=8)
    window: int | None = Field(None, ge=1)
    micro_batch: int | None = Field(None, ge=1)
    optimizer: Optimizer = Optimizer()

    @model_validator(mode="after")
    def _check_batch(self) -> Self:
        if self.micro_batch is not None and self.batch % self.micro_batch:
            raise ValueError(f"micro_batch ({self.micro_batch}) must divide batch ({self.batch})")
        return self

    def row_length(self, longest: int) -> int:
        """Return the tokens of this stage's rows, where `data.length` is `longest`."""
        return self.length or longest

    def steps(self, longest: int) -> int:
        """Return how many optimizer steps the token budget makes, where `data.length` is `longest`."""
        return max(1, round(self.tokens / (self.batch * self.row_length(longest))))

    def trained_tokens(self, longest: int) -> int:
        """Return the tokens of these steps, which are whole batches of rows."""
        return self.steps(longest) * self.batch * self.row_length(longest)


# The projections that each choice of a transfer stage's `train` adapts, besides the mixer's own parameters.
TRAINED_PROJECTIONS: dict[str, list[str]] = {
    "mixer": [],
    "qk": ["q_proj", "k_proj"],
    "qkvo": ["q_proj", "k_proj", "v_proj", "o_proj"],
}


# Rows up to which attention maps may be compared.
MAP_TOKENS = 1024


class Transfer(Stage):
    """Attention transfer: each mixer learns its own layer's attention output, layers isolated from each other.

    Args:
        train: `mixer` trains the mixer's own parameters; `qk` and `qkvo` add LoRA deltas that it alone sees.
        target: compare before or after the output projection.
        loss: squared error, as it is or divided by the target's mean square.
        scale: factor on the loss (LoLCATs: 1000).
        maps: factor on the cross-entropy between the teacher's and the mixer's attention maps, for rows of 1,024 tokens
            at most (Hedgehog: that alone; LoLCATs: 0, at 405B 1).
        patience: a layer stops once its held-out loss, measured every 100 steps, has not fallen so many times in a row.
        block: layers of a block; the student's hidden states pass through it, and each begins with the teacher's.
        order: all layers `together`, or `layerwise`: one block after the other with all of its tokens, from the
            teacher's hidden states, which are kept in memory. The same result, and one block at work.
    """

    stage: Literal["transfer"] = "transfer"
    train: Literal["mixer", "qk", "qkvo"] = "mixer"
    target: Literal["before_o_proj", "after_o_proj"] = "before_o_proj"
    loss: Literal["mse", "normalized_mse"] = "normalized_mse"
    scale: float = Field(1.0, gt=0)
    maps: float = Field(0.0, ge=0)
    patience: int | None = Field(None, ge=1)
    block: int = Field(1, ge=1)
    order: Literal["together", "layerwise"] = "together"
    lora: Lora = Lora()

    @model_validator(mode="after")
    def _check_lora(self) -> Self:
        if self.train == "mixer" and self.lora != Lora():
            raise ValueError(
                "`lora` is set but `train: mixer` has no adapters; use `train: qk` or `qkvo`, or drop `lora`"
            )
        if self.train == "mixer" and self.optimizer.mixer_lr is not None:
            raise ValueError("`optimizer.mixer_lr` has no effect: mixers alone train; give `lr`")
        return self

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if self.maps and self.block > 1:
            raise ValueError("`maps` compares layers on the teacher's input; it needs `block: 1`")
        if self.order == "layerwise" and (self.patience is not None or self.optimizer.schedule == "plateau"):
            raise ValueError(
                "`order: layerwise` has no held-out loss of all layers; use `order: together`, or drop `patience` and "
                "`schedule: plateau`"
            )
        return self


class EndToEnd(Stage):
    """What the stages that train the whole model have in common.

    Args:
        train: LoRA adapters (merged at the end), the `mixer`s' own parameters alone, all parameters of converted
            `attention`, its projections and its mixer (The Mamba in the Llama), or all parameters (`full`).
        train_mixer: the mixers' own parameters train beside the adapters.
        gradient_checkpointing: recompute activations in the backward pass; changes memory only.
    """

    train: Literal["lora", "mixer", "attention", "full"] = "lora"
    train_mixer: bool = True
    lora: Lora = Lora()
    gradient_checkpointing: bool = False

    @model_validator(mode="after")
    def _check_train(self) -> Self:
        if self.train != "lora" and self.lora != Lora():
            raise ValueError(
                f"`lora` is set but `train: {self.train}` has no adapters; use `train: lora`, or drop `lora`"
            )
        if self.train == "mixer" and not self.train_mixer:
            raise ValueError("`train: mixer` with `train_mixer: false` trains nothing")
        if self.optimizer.mixer_lr is not None and (
            self.train == "mixer" or (self.train == "lora" and not self.train_mixer)
        ):
            what = "mixers alone train; give `lr`" if self.train == "mixer" else "`train_mixer` is false"
            raise ValueError(f"`optimizer.mixer_lr` has no effect: {what}")
        return self


class Finetune(EndToEnd):
    """Next-token cross-entropy.

    Args:
        z_loss: factor on the squared log-sum-exp of the logits, which keeps them from drifting (PaLM: 1e-4).
    """

    stage: Literal["finetune"] = "finetune"
    train_mixer: bool = False
    z_loss: float = Field(0.0, ge=0)


class Distill(EndToEnd):
    """End-to-end distillation: the student's next-token distribution is brought to the teacher's.

    The loss is the mean over the labelled tokens of `kl * temperature^2 * KL + cross_entropy * CE + hidden * D`, where
    both distributions are taken at `temperature` (Hinton et al., arXiv:1503.02531). The teacher is the student's own
    model with the attention that was replaced; where those weights train, or did before, it is loaded a second time.

    Args:
        divergence: `forward` is KL(teacher || student), `reverse` KL(student || teacher).
        temperature: divides the logits of both.
        kl: factor on the divergence.
        top_k: compare the teacher's k likeliest tokens, and all others as one: never above the whole divergence, and
            equal to it where k is the vocabulary. Null compares the whole vocabulary.
        cross_entropy: factor on the cross-entropy of the labels.
        hidden: factor on D, the squared distance of each layer's output from the teacher's over the teacher's squared
            norm, mean over layers.
        teacher_device: where a copy of the teacher runs, such as `cuda:1`.
        cache: run the teacher before the stage and keep its `top_k` log-probabilities on the disk.
    """

    stage: Literal["distill"] = "distill"
    divergence: Literal["forward", "reverse"] = "forward"
    temperature: float = Field(1.0, gt=0)
    kl: float = Field(1.0, gt=0)
    top_k: int | None = Field(None, ge=1)
    cross_entropy: float = Field(0.0, ge=0)
    hidden: float = Field(0.0, ge=0)
    teacher_device: str | None = None
    cache: bool = False

    @model_validator(mode="after")
    def _check_cache(self) -> Self:
        if self.cache and self.top_k is None:
            raise ValueError("`cache: true` keeps the teacher's likeliest tokens; say how many, such as `top_k: 64`")
        if self.cache and self.hidden:
            raise ValueError("`hidden` needs the teacher's layers, and `cache: true` keeps its logits alone")
        return self


class Preference(EndToEnd):
    """Direct preference optimization with the teacher as reference (DPO, arXiv:2305.18290, eq. 7).

    The loss of a pair is `-log sigmoid(beta * (r(chosen) - r(rejected)))`, where r is the student's log-probability
    less the teacher's, summed over the answer's tokens. A pair is one row: each answer, with its prompt, has half of
    `data.length`.

    Args:
        beta: how far the student may move from the teacher; small is far.
        source: `builtin`, a file, a folder or a hub id, with rows of `prompt`, `chosen` and `rejected`: strings, or
            lists of messages. `builtin` prefers a true continuation to its words in random order.
        split: of the source.
        format: `text` joins prompt and answer, `chat` writes them through the chat template; `auto` takes strings as
            text and messages as chat.
    """

    stage: Literal["preference"] = "preference"
    beta: float = Field(0.1, gt=0)
    source: str = "builtin"
    split: str = "train"
    format: Literal["auto", "text", "chat"] = "auto"


AnyStage: TypeAlias = Annotated[Transfer | Finetune | Distill | Preference, Field(discriminator="stage")]
