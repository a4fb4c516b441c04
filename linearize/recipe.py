"""The recipe: which mixer replaces attention, where, and which stages recover the quality.

A recipe is the same object whether it comes from YAML or from code. Unknown keys are errors, and a recipe never names a
model. Mixer parts are checked against their registered classes by `linearize.mixers.check_mixer`.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import BaseModel, Field, ValidationError, model_validator

from linearize import yaml_io
from linearize.errors import LinearizeError, UnknownNameError
from linearize.recipe_errors import explain
from linearize.recipe_mixer import (
    HeadMeasure,
    Measure,
    MemoryLayers,
    Mixer,
    NonNegative,
    Part,
    Share,
    Strict,
    WindowBudget,
)
from linearize.recipe_stages import MAP_TOKENS, AnyStage, Distill, EndToEnd, Preference, Transfer

RECIPES = Path(__file__).parent / "recipes"
Pair: TypeAlias = Annotated[tuple[NonNegative, NonNegative], Field(strict=False)]
RecallName: TypeAlias = Literal["passkey", "s_niah_1", "s_niah_2", "s_niah_3", "multikey_niah", "mqar"]


class SoftmaxLayers(Strict):
    """Which layers stay softmax, all others are converted. `every` or `keep` is given, not both.

    Args:
        every: the last layer of each `every` (Liger-H: 8); none in a model of fewer.
        keep: share of the layers.
        by: the probe's measure by which `keep` chooses; spread evenly over the model without it.
    """

    every: int | None = Field(None, ge=2)
    keep: float | None = Field(None, gt=0, lt=1)
    by: Measure | None = None

    def kept(self, count: int) -> list[int]:
        """Return the layers that stay softmax in a model of `count` layers; the last of each of the equal parts."""
        if self.every is not None:
            return list(range(self.every - 1, count, self.every))
        assert self.keep is not None
        parts = round(self.keep * count)
        return [(part + 1) * count // parts - 1 for part in range(parts)]


class ExactHeads(Strict):
    """How many KV heads keep full softmax attention, and by which of the probe's measures. `keep` or `cache` is given.

    Args:
        keep: how many heads of the converted layers.
        cache: as many as fit: the largest share of the teacher's bf16 KV cache that the whole cache may have at 8,192
            tokens of one row, in the run's dtype; `10%` or 0.1.
        by: what a head is chosen by (`linearize.probe`): the drop of the answer's log-probability on recall samples,
            the divergence from the teacher, the error of the layer's output, HALO's ratio of recall to language, or
            `joint`: the same drop of recall where many heads give up softmax at once, so that heads which stand in for
            one another count.
    """

    keep: int | None = Field(None, ge=1)
    cache: Share | None = None
    by: HeadMeasure = "recall"


class Probe(Strict):
    """The samples on which `by: ...` scores heads and layers, or the file that holds the scores.

    Args:
        tasks: recall tasks (`linearize.eval.recall`).
        lengths: tokens of a sample; 2, 4 and 8 windows (256 at least) by default, up to `data.length`. Of several sizes
            of windows the smallest counts, under which heads are scored.
        samples: of each task and length.
        file: a probe.json of `linearize probe`, whose tasks, lengths and samples count then; scored anew without it.
    """

    tasks: list[RecallName] = Field(["passkey", "multikey_niah"], min_length=1)
    lengths: list[Annotated[int, Field(ge=32)]] | None = Field(None, min_length=1)
    samples: int = Field(4, ge=1)
    file: str | None = None


class Data(Strict):
    """Where the text comes from and how it becomes rows.

    Args:
        source: `builtin`, a local file or folder, a hub id, or a URL that fsspec opens, such as
            `s3://bucket/part-*.parquet`; a list mixes sources in order.
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
    """What `--quick` changes, so that the whole recipe runs on a CPU in minutes: builtin data, these sizes, and one
    sample of the probe for each task and length.

    Args:
        tokens: of all stages.
        length: tokens a row.
        batch: rows a step.
        held_out: rows.
        window: the longest of any layer, since rows are shorter; null leaves them.
        cross_entropy: the largest factor on the text in `distill`: so little text teaches its own words and nothing
            else; null leaves it.
    """

    tokens: int = Field(40_000, ge=1)
    length: int = Field(512, ge=8)
    batch: int = Field(2, ge=1)
    held_out: int = Field(8, ge=1)
    window: int | None = Field(None, ge=1)
    cross_entropy: float | None = Field(None, gt=0)


class Recipe(Strict):
    """A method of linearization.

    Args:
        name: what `--recipe` takes.
        causal: the recipe is for decoders; with false for encoders, whose tokens see later ones as well, and whose
            stages predict masked tokens.
        mixer: what replaces attention; null leaves the teacher as it is (the softmax control).
        layers: which layers are converted: all, a list, or all but those of `{every: 8}` or `{keep: 0.25}`.
        exact_heads: what keeps full softmax attention and a growing cache: (layer, KV head) pairs, or how many a probe
            chooses, `{cache: 10%, by: recall}`.
        probe: how a `by` in `layers` or `exact_heads` is scored.
        stages: what recovers the quality, in order.
        progressive: rounds of conversion (The Mamba in the Llama, arXiv:2408.15237): every round replaces an equal
            share of the layers, spread over the model, and runs the stages up to the last `distill`, or where there is
            none all but `preference`, each with an equal share of its tokens. The other stages run once, behind all
            rounds. What is replaced in a later round is the model as trained by then.
    """

    name: str = Field(min_length=1, max_length=100, pattern=r"^[^\x00-\x1f\\]+$")  # a part of the folder's name
    description: str = ""
    paper: str | None = None
    causal: bool = True
    mixer: Mixer | None = Mixer()
    layers: Literal["all"] | list[NonNegative] | SoftmaxLayers = "all"
    exact_heads: list[Pair] | ExactHeads = []
    probe: Probe = Probe()
    stages: list[AnyStage] = []
    progressive: int = Field(1, ge=1, le=4096)
    data: Data = Data()
    quick: Quick = Quick()

    @model_validator(mode="after")
    def _check(self) -> Self:
        self._check_layers()
        self._check_exact_heads()
        self._check_cache_dtype()
        self._check_stages()
        if not self.causal:
            self._check_encoder()
        return self

    def _check_encoder(self) -> None:
        if self.probed:
            raise ValueError("a probe asks for what was read before; with `causal: false` name layers and heads")
        for stage in self.stages:
            if isinstance(stage, Preference):
                raise ValueError("a `preference` stage compares continuations, and `causal: false` has none; drop it")
            if isinstance(stage, Distill) and stage.cache:
                raise ValueError("`cache: true` keeps answers about rows, which `causal: false` masks anew; drop it")

    def _check_stages(self) -> None:
        trained = ""
        for stage in self.stages:
            if self.mixer is None and isinstance(stage, Transfer | Preference):
                raise ValueError(f"a `{stage.stage}` stage needs a mixer to train, and `mixer` is null")
            if self.mixer is None and isinstance(stage, Distill) and not stage.cross_entropy:
                raise ValueError("a `distill` stage where `mixer` is null starts at its optimum; give `cross_entropy`")
            if self.mixer is None and stage.optimizer.mixer_lr is not None:
                raise ValueError("`optimizer.mixer_lr` has no effect where `mixer` is null; drop it")
            self._check_stage_window(stage)
            length = stage.row_length(self.data.length)
            if self.data.length % length:
                raise ValueError(
                    f"`length: {length}` of stage `{stage.stage}` does not divide `data.length` ({self.data.length}), "
                    "whose rows it cuts"
                )
            if isinstance(stage, Transfer) and stage.maps and length > MAP_TOKENS:
                raise ValueError(
                    f"a `transfer` stage has `maps`, whose memory grows with the square of the row: set `data.length` "
                    f"({length}), or `length` of the stage, to {MAP_TOKENS} at most, or drop `maps`"
                )
            if stage.stage == "transfer" and trained:
                raise ValueError(
                    f"a `transfer` stage stands behind a `{trained}` stage, which has changed its teacher by then"
                )
            trained = trained or (stage.stage if stage.stage != "transfer" else "")

        if self.progressive > 1:
            self._check_progressive()

    def _check_stage_window(self, stage: AnyStage) -> None:
        if stage.window is None:
            return
        given = f"`window: {stage.window}` of stage `{stage.stage}`"
        window = None if self.mixer is None else self.mixer.window
        if window is None:
            raise ValueError(f"{given} has no effect: there is no `mixer.window`; drop it")
        if window.kind == "terrace":
            raise ValueError(f"{given} is of sliding windows, and `mixer.window.kind` is terrace; drop it")
        if window.sizes == [stage.window]:
            raise ValueError(f"{given} has no effect: `mixer.window.size` is the same; take another, or drop it")

    def _check_progressive(self) -> None:
        kinds = [stage.stage for stage in self.stages]
        if self.mixer is None or set(kinds) <= {"preference"}:
            raise ValueError("`progressive` repeats the stages that train mixers, and there are none; drop it")
        if "preference" in kinds and set(kinds[kinds.index("preference") :]) != {"preference"}:
            raise ValueError("with `progressive`, `preference` stages come last: they run once, behind all rounds")

    def schedule(self) -> list[tuple[int, AnyStage]]:
        """Return every stage that runs, in order, with the round (from 0) that it runs in."""
        if self.progressive == 1:
            return [(0, stage) for stage in self.stages]
        repeats = self._repeats()
        shares = [
            stage.model_copy(update={"tokens": max(1, stage.tokens // self.progressive)})
            for stage in self.stages[:repeats]
        ]
        rounds = [(turn, share) for turn in range(self.progressive) for share in shares]
        return rounds + [(self.progressive - 1, stage) for stage in self.stages[repeats:]]

    def _repeats(self) -> int:
        """How many of the stages, from the first, run in every round of `progressive`."""
        kinds = [stage.stage for stage in self.stages]
        if "distill" in kinds:
            return len(kinds) - kinds[::-1].index("distill")
        return len(kinds) - kinds.count("preference")

    def joining(self, layers: list[int], turn: int) -> list[int]:
        """Return which of the converted layers are replaced in a round.

        Raises:
            LinearizeError: there are more rounds than layers.
        """
        if len(layers) < self.progressive:
            raise LinearizeError(f"`progressive` is {self.progressive}, and only {len(layers)} layers are converted.")
        return layers[turn :: self.progressive]

    def needs_teacher_copy(self, index: int, all_converted: bool = True) -> bool:
        """Return whether stage `index` of `schedule` needs the teacher anew: its weights train there, or did before.

        Args:
            index: of the stage.
            all_converted: no layer of the model stays softmax, which the teacher and the student would share.
        """
        stages = [stage for _, stage in self.schedule()]
        stage = stages[index]
        if not isinstance(stage, Distill | Preference):
            return False
        before = [s for s in stages[:index] if isinstance(s, EndToEnd)]
        moved = not all(self._keeps_teacher(s, all_converted) for s in before)
        if isinstance(stage, Preference):  # its teacher runs before the first step, and so does a cached one
            return moved
        return moved or stage.teacher_device is not None or (stage.train in ("attention", "full") and not stage.cache)

    def _keeps_teacher(self, stage: EndToEnd, all_converted: bool) -> bool:
        """Whether a stage changes nothing but converted attention, of which the teacher has its own."""
        if stage.train == "lora":
            return (
                self.progressive == 1
                and self.layers == "all"
                and all_converted
                and set(stage.lora.targets) <= {"q_proj", "k_proj", "v_proj", "o_proj"}
            )
        return stage.train == "mixer"

    def _check_layers(self) -> None:
        if self.layers == "all":
            return
        if self.mixer is None:
            raise ValueError("`layers` names layers to convert, and `mixer` is null")
        if isinstance(self.layers, SoftmaxLayers):
            if (self.layers.every is None) == (self.layers.keep is None):
                raise ValueError("`layers` takes `every` or `keep`, one of them: `{every: 8}` or `{keep: 0.25}`")
            if self.layers.by is not None and self.layers.keep is None:
                raise ValueError("`layers.by` chooses for `keep`, and `every` leaves it no choice; drop one of them")
            return
        if not self.layers:
            raise ValueError("`layers` is empty; use `all`, or `mixer: null` to convert nothing")
        if len(set(self.layers)) < len(self.layers):
            raise ValueError(f"`layers` repeats a layer: {self.layers}")

    def _check_exact_heads(self) -> None:
        if self.mixer is None and self.exact_heads:
            raise ValueError("`exact_heads` has no effect where `mixer` is null; drop it")
        if self.probe.file is not None and not self.probed:
            raise ValueError("`probe.file` has no effect where nothing is chosen `by` it: `exact_heads: {keep: 7}`")
        if isinstance(self.exact_heads, ExactHeads):
            if (self.exact_heads.keep is None) == (self.exact_heads.cache is None):
                raise ValueError("`exact_heads` takes `keep` or `cache`, one of them: `{keep: 7}` or `{cache: 10%}`")
            return
        if len(set(self.exact_heads)) < len(self.exact_heads):
            raise ValueError(f"`exact_heads` repeats a pair: {[list(pair) for pair in self.exact_heads]}")
        for layer, head in self.exact_heads:
            if isinstance(self.layers, list) and layer not in self.layers:
                raise ValueError(f"`exact_heads` has [{layer}, {head}], but layer {layer} is not among `layers`")

    def _check_cache_dtype(self) -> None:
        if self.mixer is None or self.mixer.cache_dtype == "model":
            return
        if not self.causal:
            raise ValueError("`mixer.cache_dtype` has no effect with `causal: false`: encoders have no cache; drop it")
        if self.mixer.window is None and not self.exact_heads:
            raise ValueError(
                "`mixer.cache_dtype` has no effect: it is of the keys and values of a window and of exact heads, and "
                "there are none; drop it"
            )

    def check_probe(self, before: Recipe) -> None:
        """Raise where `probe` is set and a run makes none; `linearize probe` makes one whatever a recipe chooses.

        Args:
            before: this recipe before overrides, which may take away what the probe chose and leave its settings.

        Raises:
            LinearizeError: it is.
        """
        if self.probed or before.probed or self.probe in (Probe(), Probe(samples=1)):  # the latter is of `with_quick`
            return
        raise LinearizeError(
            f"`probe` of recipe {self.name!r} has no effect where nothing is chosen `by` it. Drop it, or let it "
            "choose: `exact_heads: {keep: 7}`."
        )

    @property
    def probed(self) -> bool:
        """Whether layers, heads, memories or sizes of windows are still to be chosen by the probe."""
        by_layer = isinstance(self.layers, SoftmaxLayers) and self.layers.by is not None
        heads = isinstance(self.exact_heads, ExactHeads)
        return by_layer or heads or self.window_budget is not None or self.memory_choice is not None

    @property
    def window_budget(self) -> WindowBudget | None:
        """What sizes of windows are still to be chosen by, if they are."""
        size = None if self.mixer is None or self.mixer.window is None else self.mixer.window.size
        return size if isinstance(size, WindowBudget) else None

    @property
    def memory_choice(self) -> MemoryLayers | None:
        """How the layers with a memory are still to be chosen, if they are."""
        layers = None if self.mixer is None else self.mixer.memory_layers
        return layers if isinstance(layers, MemoryLayers) else None

    def with_memories(self, layers: list[int] | Literal["all"]) -> Recipe:
        """Return the recipe with a memory in these layers."""
        assert self.mixer is not None
        return self.model_copy(update={"mixer": self.mixer.model_copy(update={"memory_layers": layers})})

    def with_windows(self, size: int | list[int]) -> Recipe:
        """Return the recipe with these sizes of windows."""
        assert self.mixer is not None and self.mixer.window is not None
        window = self.mixer.window.model_copy(update={"size": size})
        return self.model_copy(update={"mixer": self.mixer.model_copy(update={"window": window})})

    def converted_layers(self, count: int) -> list[int]:
        """Return which layers are converted in a model of `count` layers; evenly spread while a probe is to choose.

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
            stage["batch"], stage["micro_batch"], stage["length"] = self.quick.batch, 1, None
            if self.quick.cross_entropy is not None and stage["stage"] == "distill":
                stage["cross_entropy"] = min(stage["cross_entropy"], self.quick.cross_entropy)
            if stage["stage"] == "preference":
                stage.update(source="builtin", split="train", format="auto")
        tree["probe"]["samples"] = 1
        most, window = self.quick.window, None if self.mixer is None else self.mixer.window
        if most is not None and window is not None:
            size = window.size
            tree["mixer"]["window"]["size"] = (
                [min(one, most) for one in size] if isinstance(size, list) else min(window.sizes[-1], most)
            )
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
