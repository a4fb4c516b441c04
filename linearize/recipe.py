"""The recipe: which mixer replaces attention, where, and which stages recover the quality.

A recipe is the same object whether it comes from YAML or from code. Unknown keys are errors, and a recipe never names a
model. Mixer parts are checked against their registered classes by `linearize.mixers.check_mixer`.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from linearize import yaml_io
from linearize.errors import LinearizeError, UnknownNameError
from linearize.recipe_errors import explain

RECIPES = Path(__file__).parent / "recipes"


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
    """A causal softmax window of `size` tokens (its own included) and the first `sinks` tokens of a document.

    Args:
        kind: `sliding`, or `terrace`: blocks of `size` tokens, of which a token sees its own up to itself and the one
            before (LoLCATs as it trains). A terrace has no sinks.
    """

    size: int = Field(64, ge=1)
    sinks: int = Field(0, ge=0)
    kind: Literal["sliding", "terrace"] = "sliding"

    @model_validator(mode="after")
    def _check_kind(self) -> Self:
        if self.kind == "terrace" and self.sinks:
            raise ValueError("`kind: terrace` has no sinks; set `sinks: 0`, or `kind: sliding`")
        return self


class Conv(Strict):
    """A causal depthwise convolution on what the memory reads. In YAML `4` is short for `{taps: 4}`.

    Args:
        taps: tokens that it mixes, its own included.
        inputs: `qkv`, the queries, keys and values by the teacher's heads; or `v`, the values alone by the memory's
            heads (Mamba-1).
        activation: behind it; `silu` in Mamba.
        identity: start as the identity. Mamba's start is random.
    """

    taps: int = Field(4, ge=2)
    inputs: Literal["qkv", "v"] = "qkv"
    activation: Literal["none", "silu"] = "none"
    identity: bool = True

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        return {"taps": value} if isinstance(value, int) else value


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


NonNegative: TypeAlias = Annotated[int, Field(ge=0, strict=True)]
Pair: TypeAlias = Annotated[tuple[NonNegative, NonNegative], Field(strict=False)]


class Optimizer(Strict):
    """AdamW and its schedule. `warmup` and the cosine are fractions of the stage's steps."""

    lr: float = Field(1e-3, gt=0)
    schedule: Literal["cosine", "plateau", "constant"] = "cosine"
    warmup: float = Field(0.05, ge=0, lt=1)
    min_lr: float = Field(0.0, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    betas: Annotated[tuple[float, float], Field(strict=False)] = (0.9, 0.999)
    clip: float | None = Field(1.0, gt=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr ({self.min_lr:g}) is above lr ({self.lr:g})")
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
    """What every stage has: its token budget (trained tokens), its rows per optimizer step, its optimizer."""

    tokens: int = Field(1_000_000, ge=1)
    batch: int = Field(8, ge=1)
    micro_batch: int | None = Field(None, ge=1)
    optimizer: Optimizer = Optimizer()

    @model_validator(mode="after")
    def _check_batch(self) -> Self:
        if self.micro_batch is not None and self.batch % self.micro_batch:
            raise ValueError(f"micro_batch ({self.micro_batch}) must divide batch ({self.batch})")
        return self

    def steps(self, length: int) -> int:
        """Return how many optimizer steps the token budget makes with rows of `length` tokens."""
        return max(1, round(self.tokens / (self.batch * length)))


# The projections that each choice of a transfer stage's `train` adapts, besides the mixer's own parameters.
TRAINED_PROJECTIONS: dict[str, list[str]] = {
    "mixer": [],
    "qk": ["q_proj", "k_proj"],
    "qkvo": ["q_proj", "k_proj", "v_proj", "o_proj"],
}


class Transfer(Stage):
    """Attention transfer: each mixer learns its own layer's attention output, layers isolated from each other.

    Args:
        train: `mixer` trains the mixer's own parameters; `qk` and `qkvo` add LoRA deltas that it alone sees.
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

    @model_validator(mode="after")
    def _check_lora(self) -> Self:
        if self.train == "mixer" and self.lora != Lora():
            raise ValueError(
                "`lora` is set but `train: mixer` has no adapters; use `train: qk` or `qkvo`, or drop `lora`"
            )
        return self


class Finetune(Stage):
    """Next-token cross-entropy with LoRA adapters (merged at the end) or on all parameters.

    Args:
        train: `lora` or `full`.
        train_mixer: the mixers' own parameters train too.
        z_loss: factor on the squared log-sum-exp of the logits, which keeps them from drifting (PaLM: 1e-4).
        gradient_checkpointing: recompute activations in the backward pass; changes memory only.
    """

    stage: Literal["finetune"] = "finetune"
    train: Literal["lora", "full"] = "lora"
    train_mixer: bool = False
    z_loss: float = Field(0.0, ge=0)
    lora: Lora = Lora()
    gradient_checkpointing: bool = False

    @model_validator(mode="after")
    def _check_lora(self) -> Self:
        if self.train == "full" and self.lora != Lora():
            raise ValueError("`lora` is set but `train: full` has no adapters; use `train: lora`, or drop `lora`")
        return self


class Distill(Stage):
    """End-to-end distillation: the student's next-token distribution is brought to the teacher's.

    The loss is the mean over the labelled tokens of `kl * temperature^2 * KL + cross_entropy * CE`, where both
    distributions are taken at `temperature` (Hinton et al., arXiv:1503.02531). The teacher is the same model with the
    attention that was replaced, so its weights must not train.

    Args:
        train: `lora` adapters, or the `mixer`s' own parameters alone.
        train_mixer: the mixers' own parameters train too.
        divergence: `forward` is KL(teacher || student), `reverse` KL(student || teacher).
        temperature: divides the logits of both.
        kl: factor on the divergence.
        cross_entropy: factor on the cross-entropy of the labels.
        gradient_checkpointing: recompute activations in the backward pass; changes memory only.
    """

    stage: Literal["distill"] = "distill"
    train: Literal["lora", "mixer", "full"] = "lora"
    train_mixer: bool = True
    divergence: Literal["forward", "reverse"] = "forward"
    temperature: float = Field(1.0, gt=0)
    kl: float = Field(1.0, gt=0)
    cross_entropy: float = Field(0.0, ge=0)
    lora: Lora = Lora()
    gradient_checkpointing: bool = False

    @model_validator(mode="after")
    def _check_train(self) -> Self:
        if self.train == "full":
            raise ValueError(
                "`train: full` would move the teacher, whose weights the student shares; use `train: lora` or `mixer`"
            )
        if self.train == "mixer" and self.lora != Lora():
            raise ValueError("`lora` is set but `train: mixer` has no adapters; use `train: lora`, or drop `lora`")
        if self.train == "mixer" and not self.train_mixer:
            raise ValueError("`train: mixer` with `train_mixer: false` trains nothing")
        return self


AnyStage: TypeAlias = Annotated[Transfer | Finetune | Distill, Field(discriminator="stage")]


class SoftmaxLayers(Strict):
    """Which layers stay softmax, spread evenly over the model; all others are converted. Exactly one is given.

    Args:
        every: the last layer of each `every` (Liger-H: 8); none in a model of fewer.
        keep: share of the layers.
    """

    every: int | None = Field(None, ge=2)
    keep: float | None = Field(None, gt=0, lt=1)

    def kept(self, count: int) -> list[int]:
        """Return the layers that stay softmax in a model of `count` layers; the last of each of the equal parts."""
        if self.every is not None:
            return list(range(self.every - 1, count, self.every))
        assert self.keep is not None
        parts = round(self.keep * count)
        return [(part + 1) * count // parts - 1 for part in range(parts)]


class Data(Strict):
    """Where the text comes from and how it becomes rows.

    Args:
        source: `builtin`, a local file or folder, or a hub id; a list mixes sources in order.
        format: `text` rows, `chat` (the teacher's chat template), `alpaca` (instruction, input, output), or found out.
        loss: train on all tokens or on the responses alone.
        length: tokens a row.
        held_out: rows kept for evaluation.
        streaming: read the source row by row instead of all at once.
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
        layers: which layers are converted: all, a list, or all but those of `{every: 8}` or `{keep: 0.25}`.
        exact_heads: (layer, KV head) pairs that keep full softmax attention and a growing cache.
        stages: what recovers the quality, in order.
    """

    name: str = Field(min_length=1)
    description: str = ""
    paper: str | None = None
    mixer: Mixer | None = Mixer()
    layers: Literal["all"] | list[NonNegative] | SoftmaxLayers = "all"
    exact_heads: list[Pair] = []
    stages: list[AnyStage] = []
    data: Data = Data()
    quick: Quick = Quick()

    @model_validator(mode="after")
    def _check(self) -> Self:
        self._check_layers()
        self._check_exact_heads()
        self._check_stages()
        return self

    def _check_stages(self) -> None:
        earlier: list[Finetune | Distill] = []
        for stage in self.stages:
            if stage.stage != "finetune" and self.mixer is None:
                raise ValueError(f"a `{stage.stage}` stage needs a mixer to train, and `mixer` is null")
            if isinstance(stage, Transfer):
                if earlier:
                    raise ValueError(
                        f"a `transfer` stage stands behind a `{earlier[0].stage}` stage, which has changed its teacher "
                        "by then"
                    )
                continue
            if isinstance(stage, Distill) and not all(map(self._keeps_teacher, earlier)):
                raise ValueError(
                    "a `distill` stage stands behind a stage that changed weights which its teacher shares; before "
                    "it, train LoRA on q_proj, k_proj, v_proj or o_proj alone, with `layers: all`"
                )
            earlier.append(stage)

    def _keeps_teacher(self, stage: Finetune | Distill) -> bool:
        """Whether a stage changes nothing but converted attention, of which the teacher has its own."""
        if stage.train == "lora":
            return self.layers == "all" and set(stage.lora.targets) <= {"q_proj", "k_proj", "v_proj", "o_proj"}
        return stage.train == "mixer"

    def _check_layers(self) -> None:
        if self.layers == "all":
            return
        if self.mixer is None:
            raise ValueError("`layers` names layers to convert, and `mixer` is null")
        if isinstance(self.layers, SoftmaxLayers):
            if (self.layers.every is None) == (self.layers.keep is None):
                raise ValueError("`layers` takes `every` or `keep`, one of them: `{every: 8}` or `{keep: 0.25}`")
            return
        if not self.layers:
            raise ValueError("`layers` is empty; use `all`, or `mixer: null` to convert nothing")
        if len(set(self.layers)) < len(self.layers):
            raise ValueError(f"`layers` repeats a layer: {self.layers}")

    def _check_exact_heads(self) -> None:
        if self.mixer is None and self.exact_heads:
            raise ValueError("`exact_heads` has no effect where `mixer` is null; drop it")
        if len(set(self.exact_heads)) < len(self.exact_heads):
            raise ValueError(f"`exact_heads` repeats a pair: {[list(pair) for pair in self.exact_heads]}")
        for layer, head in self.exact_heads:
            if isinstance(self.layers, list) and layer not in self.layers:
                raise ValueError(f"`exact_heads` has [{layer}, {head}], but layer {layer} is not among `layers`")

    def converted_layers(self, count: int) -> list[int]:
        """Return which layers are converted in a model of `count` layers.

        Raises:
            LinearizeError: a named layer does not exist, or the share that stays is no layer or every layer.
        """
        if self.mixer is None:
            return []
        if self.layers == "all":
            return list(range(count))
        if isinstance(self.layers, SoftmaxLayers):
            kept = self.layers.kept(count)
            if len(kept) == count or (not kept and self.layers.keep is not None):
                raise LinearizeError(
                    f"`layers` keeps {len(kept)} of the model's {count} layers as softmax; use `layers: all`, `mixer: "
                    "null`, or other numbers."
                )
            return [index for index in range(count) if index not in kept]
        wrong = [index for index in self.layers if index >= count]
        if wrong:
            raise LinearizeError(f"`layers` names layer {wrong[0]}; the model has layers 0 to {count - 1}.")
        return sorted(self.layers)

    @classmethod
    def parse(cls, value: Any, where: str) -> Recipe:
        """Return the recipe that a parsed YAML value describes.

        Args:
            value: what `yaml_io.parse` returned.
            where: the file or name it came from; used in errors.

        Raises:
            LinearizeError: with the key, what was expected and what was got.
        """
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            raise LinearizeError(explain(error, value, cls, where)) from None

    @classmethod
    def from_yaml(cls, path_or_name: str | Path, overrides: Iterable[str] = ()) -> Recipe:
        """Return the recipe in a YAML file or in the package.

        Args:
            path_or_name: a file that ends in .yaml or .yml, or a packaged name such as `liger` or `paper/liger`.
            overrides: `key.path=value` settings that replace the file's, in order.

        Raises:
            UnknownNameError: no packaged recipe has this name.
            LinearizeError: the file is missing, is not a recipe, or an override names no key of it.
        """
        path = recipe_path(path_or_name)
        recipe = cls.parse(yaml_io.read(path), str(path_or_name))
        return recipe.with_overrides(overrides)

    @classmethod
    def resolve(cls, recipe: Recipe | str | Path, overrides: Iterable[str] = ()) -> Recipe:
        """Return a recipe from an object, a name or a file, with overrides applied."""
        if isinstance(recipe, Recipe):
            return recipe.with_overrides(overrides)
        return cls.from_yaml(recipe, overrides)

    def to_yaml(self) -> str:
        """Return the whole recipe, defaults included, as YAML that `from_yaml` reads back to an equal object."""
        return yaml_io.dump(_tree(self, short=True))

    def with_overrides(self, overrides: Iterable[str]) -> Recipe:
        """Return a copy with dotted settings replaced, for example `stages.0.optimizer.lr=1e-4`.

        Raises:
            LinearizeError: an override has no `=`, names no key, or gives a value that the key does not take.
        """
        settings = list(overrides)
        if not settings:
            return self
        tree = _tree(self)
        for setting in settings:
            _set(tree, setting)
        return self.parse(tree, f"{self.name} with {' '.join(settings)}")

    def prepare(
        self,
        *,
        data: str | list[str] | None = None,
        tokens: int | None = None,
        quick: bool = False,
        overrides: Iterable[str] = (),
    ) -> Recipe:
        """Return the recipe that a run with these settings carries out.

        `quick` comes first, then `data` and `tokens`, then the overrides; those of the `quick` section come before it.

        Args:
            data: replaces `data.source`; the format is found out anew.
            tokens: total over the stages, split in the recipe's ratio.
            quick: cut down to the `quick` section, on builtin data.
            overrides: `key.path=value` settings.

        Raises:
            LinearizeError: an override is wrong, or a setting would have no effect beside the others.
        """
        settings = list(overrides)
        early = [setting for setting in settings if setting.startswith(("quick.", "quick="))]
        if early and not quick:
            raise LinearizeError(f"The override {early[0]!r} has an effect only together with --quick; add it.")
        budgets = [s for s in settings if s.partition("=")[0].startswith("stages.") and ".tokens=" in s]
        if budgets and (tokens is not None):
            raise LinearizeError(f"--tokens {tokens} and the override {budgets[0]!r} both set token budgets; drop one.")
        recipe = self.with_overrides(early)
        recipe = recipe.with_quick() if quick else recipe
        if data is not None:
            recipe = recipe.with_data(data)
        if tokens is not None:
            recipe = recipe.with_tokens(tokens)
        return recipe.with_overrides(setting for setting in settings if setting not in early)

    def with_data(self, source: str | list[str]) -> Recipe:
        """Return a copy on other data: the format is found out, and builtin text is learned on all of its tokens."""
        tree = _tree(self)
        tree["data"].update(source=source, split="train", format="auto")
        if source == "builtin":
            tree["data"].update(loss="all", streaming=False)
        return self.parse(tree, self.name)

    def with_tokens(self, total: int) -> Recipe:
        """Return a copy whose stages train `total` tokens together, split in this recipe's ratio.

        Raises:
            LinearizeError: the recipe has no stage, or `total` gives a stage no token.
        """
        if not self.stages:
            raise LinearizeError(f"Recipe {self.name!r} has no stage, so a token budget has nothing to train.")
        now = [stage.tokens for stage in self.stages]
        ends = [round(total * sum(now[: i + 1]) / sum(now)) for i in range(len(now))]
        shares = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        if min(shares) < 1:
            raise LinearizeError(
                f"{total} tokens leave a stage of recipe {self.name!r} with none; give it more tokens."
            )
        tree = _tree(self)
        for stage, share in zip(tree["stages"], shares, strict=True):
            stage["tokens"] = share
        return self.parse(tree, self.name)

    def with_quick(self) -> Recipe:
        """Return a copy cut down to the sizes of its `quick` section, on builtin data: minutes on a CPU."""
        tree = _tree(self)
        tree["data"] = _tree(Data(length=self.quick.length, held_out=self.quick.held_out))
        for stage in tree["stages"]:
            stage["batch"], stage["micro_batch"] = self.quick.batch, 1
        recipe = self.parse(tree, self.name)
        return recipe.with_tokens(self.quick.tokens) if self.stages else recipe


def recipe_names() -> list[str]:
    """Return the name of every packaged recipe, sorted."""
    return sorted(path.relative_to(RECIPES).with_suffix("").as_posix() for path in RECIPES.rglob("*.yaml"))


def recipe_path(path_or_name: str | Path) -> Path:
    """Return the file of a recipe that is given as a packaged name or as a path to a YAML file.

    Raises:
        UnknownNameError: no packaged recipe has this name.
        LinearizeError: the path to a YAML file holds no file.
    """
    path = Path(path_or_name)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise LinearizeError(f"There is no recipe file {path}. `linearize ls` lists the packaged recipes.")
        return path
    names = recipe_names()
    if str(path_or_name) not in names:
        raise UnknownNameError("recipe", str(path_or_name), names)
    return RECIPES / f"{path_or_name}.yaml"


class _Fields(dict[str, Any]):
    """The fields of a recipe type as a tree: the keys are all that there are."""


def _tree(node: Any, short: bool = False) -> Any:
    """Return a recipe type as a tree of dicts and lists; `short` writes a part without options as its name."""
    if isinstance(node, Part):
        options = {key: _tree(value, short) for key, value in (node.model_extra or {}).items()}
        return node.name if short and not options else {"name": node.name, **options}
    if isinstance(node, BaseModel):
        order = sorted(type(node).model_fields, key=lambda key: key != "stage")
        return _Fields({key: _tree(getattr(node, key), short) for key in order})
    if isinstance(node, dict):
        return {key: _tree(value, short) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [_tree(item, short) for item in node]
    return node


def _set(tree: Any, setting: str) -> None:
    """Write one `key.path=value` into a tree from `_tree`."""
    path, equals, text = setting.partition("=")
    if not equals or not path:
        raise LinearizeError(f"The override {setting!r} is not of the form key.path=value, such as data.length=512.")
    keys = path.split(".")
    node = tree
    for depth, key in enumerate(keys):
        at = _locate(node, key, ".".join(keys[:depth]), setting)
        if depth == len(keys) - 1:
            node[at] = yaml_io.parse(text, f"the override {setting!r}")
        else:
            node = node[at]


def _locate(node: Any, key: str, parent: str, setting: str) -> str | int:
    """Return `key` as the index that it is in `node`, which sits at the path `parent`."""
    place = f"`{parent}`" if parent else "the recipe"
    if isinstance(node, list):
        if not key.isdigit() or int(key) >= len(node):
            raise LinearizeError(
                f"The override {setting!r} names entry {key!r} of {place}, a list of {len(node)}: "
                f"give an index below {len(node)}, or the whole list."
            )
        return int(key)
    if isinstance(node, _Fields) and key not in node:
        raise UnknownNameError("key", key, node, where=setting)
    if not isinstance(node, dict):
        raise LinearizeError(
            f"The override {setting!r} names key {key!r} of {place}, which is {node!r}: "
            f"set {place} as a whole, as in {parent}={{{key}: ...}}."
        )
    return key
