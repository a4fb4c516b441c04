"""The teacher: a local folder, a hub id, a .gguf file or an alias -> its config, or its weights and tokenizer."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from linearize.aliases import HubSource, alias_names, read_alias
from linearize.errors import LinearizeError, UnknownNameError
from linearize.fetch import WANTED, Files, cached_alias, from_alias, from_folder, from_gguf, from_hub, snapshot
from linearize.headers import safetensors_elements
from linearize.weights import check_folder, check_gguf, check_promise, check_sizes

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", re.ASCII)
CAUSAL = ("ForCausalLM", "LMHeadModel")
MASKED = ("ForMaskedLM", "ForPreTraining")


@dataclass(frozen=True)
class TeacherSource:
    """Where a teacher is, before anything was downloaded.

    Attributes:
        name: short name, as used in the default output folder.
        kind: which of the four ways it was given.
        location: the alias, folder, file or hub id.
        revision: branch, tag or commit of a hub id.
    """

    name: str
    kind: Literal["alias", "folder", "hub", "gguf"]
    location: str
    revision: str | None = None


@dataclass(frozen=True)
class TeacherInfo:
    """What was loaded, as `recipe.lock.yaml` and the model card state it.

    Attributes:
        name: as in `TeacherSource`.
        source: such as `hub:org/name@main`, `wheel:name==version/file` or `folder:/path`.
        revision: the commit of a hub source, the version of a wheel.
        license: as the source states it, or None.
        sha256: of the files that were read, where that is cheap.
        folder: the local folder that was loaded.
    """

    name: str
    source: str
    revision: str | None
    license: str | None
    sha256: dict[str, str]
    folder: Path


def resolve(model: str) -> TeacherSource:
    """Return where a teacher is; nothing is downloaded.

    An alias comes before a folder of the same name: write `./name` for the folder.

    Args:
        model: what `--model` was given.

    Raises:
        LinearizeError: it is none of the four (the message lists near aliases), or a file or folder that is missing.
    """
    if model in alias_names():
        return TeacherSource(model, "alias", model)
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise LinearizeError(f"There is no file {model}. Give the path of a .gguf file that exists.")
        return TeacherSource(path.stem, "gguf", str(path))
    if path.is_dir():
        return TeacherSource(path.resolve().name, "folder", str(path))
    if HUB_ID.fullmatch(model) and not model.startswith("."):
        repository, _, revision = model.partition("@")
        return TeacherSource(repository.rpartition("/")[2], "hub", repository, revision or "main")
    if model.startswith((".", "/", "~")):
        raise LinearizeError(f"There is no folder {model}. Give a folder that exists, an alias or a hub id.")
    unknown = UnknownNameError("model", model, alias_names())
    raise LinearizeError(f"{unknown} A folder, a .gguf file or a hub id such as org/name serves as well.")


def local_folder(place: str | Path) -> Path:
    """Return a folder as it is, or the local copy of the hub repository that a text names (`owner/name@revision`).

    Raises:
        LinearizeError: the repository cannot be had.
    """
    text = str(place)
    if Path(place).exists() or not HUB_ID.fullmatch(text) or text.startswith("."):
        return Path(place)
    repository, _, revision = text.partition("@")
    return snapshot(repository, revision or "main", WANTED)


def base_model(source: TeacherSource) -> str | None:
    """Return a teacher's repository on the hub, wherever its files came from; None where it is in none."""
    if source.kind == "alias":
        return next((one.hub for one in read_alias(source.location).sources if isinstance(one, HubSource)), None)
    return source.location if source.kind == "hub" else None


def load_config(source: TeacherSource, trust_remote_code: bool = False) -> PretrainedConfig:
    """Return a teacher's config without its weights; an alias needs no download.

    Raises:
        LinearizeError: the source holds no causal language model that can be linearized.
    """
    from transformers import AutoConfig

    if source.kind == "alias":
        cached = cached_alias(source.location)
        if cached is None:
            return AutoConfig.for_model(**read_alias(source.location).config)
        return _config(cached, trust_remote_code)
    if source.kind == "folder":
        return _config(Path(source.location), trust_remote_code)
    if source.kind == "gguf":
        path = Path(source.location)
        check_gguf(path)
        config = _read(AutoConfig, path.parent, str(path), gguf_file=path.name)
        check_sizes(config, str(path))
        return config
    folder = snapshot(source.location, source.revision or "main", ["config.json", "*.py"])
    return _config(folder, trust_remote_code, weights=False)


def fetch(source: TeacherSource) -> Files:
    """Return a teacher's files on this machine, downloaded or converted where they are not cached.

    Raises:
        LinearizeError: they cannot be had.
    """
    if source.kind == "alias":
        return from_alias(source.location)
    if source.kind == "gguf":
        return from_gguf(Path(source.location))
    if source.kind == "hub":
        return from_hub(source.location, source.revision or "main")
    check_folder(Path(source.location))
    return from_folder(Path(source.location))


def local_config(files: Files, trust_remote_code: bool = False) -> PretrainedConfig:
    """Return the config of a teacher whose files are here, checked against its weights.

    Raises:
        LinearizeError: it holds no language model that can be linearized, or another than the weights.
    """
    config = _config(files.folder, trust_remote_code)
    held = sum(safetensors_elements(path) for path in files.folder.glob("*.safetensors"))
    check_promise(config, held, str(files.folder))
    return config


def load_teacher(
    source: TeacherSource,
    dtype: torch.dtype,
    device: torch.device | str,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, TeacherInfo]:
    """Return a teacher in eval mode, its tokenizer, and what was loaded.

    Args:
        source: from `resolve`.
        dtype: of the weights.
        device: where they go.
        trust_remote_code: run the Python files of the checkpoint, where its class needs them.

    Raises:
        LinearizeError: the files cannot be had, are damaged, or hold no causal language model with a tokenizer.
    """
    from transformers import AutoModelForCausalLM

    from linearize.modeling import auto_class
    from linearize.registry import families

    files = fetch(source)
    config = local_config(files, trust_remote_code)
    known = config.model_type in families
    try:
        model, report = (auto_class(config.model_type) if known else AutoModelForCausalLM).from_pretrained(
            files.folder,
            dtype=dtype,
            attn_implementation=attention_kind(config),
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            use_safetensors=True,
        )
    except Exception as error:  # transformers and safetensors raise many kinds, `Exception` itself among them
        raise LinearizeError(f"{files.folder} cannot be loaded: {_one_line(error)}") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise LinearizeError(
            f"The weights in {files.folder} lack {len(missing)} of the model's tensors, {missing[0]} among them. "
            "Download the model again."
        )
    tokenizer, info = load_tokenizer(source, files)
    return model.to(device).eval(), tokenizer, info


def load_tokenizer(source: TeacherSource, files: Files) -> tuple[PreTrainedTokenizerBase, TeacherInfo]:
    """Return the tokenizer among a teacher's files, and what they are.

    Raises:
        LinearizeError: it is missing or damaged.
    """
    from transformers import AutoTokenizer

    tokenizer = _read(AutoTokenizer, files.folder, f"the tokenizer in {files.folder}")
    info = TeacherInfo(source.name, files.origin, files.revision, files.license, files.sha256, files.folder)
    return tokenizer, info


def attention_kind(config: PretrainedConfig) -> str:
    """Return which of transformers' implementations of attention a teacher runs: SDPA, which has no cap on scores."""
    return "eager" if getattr(config, "attn_logit_softcapping", None) else "sdpa"


def check_causal(config: PretrainedConfig, where: str) -> None:
    """Raise unless a config is that of a decoder-only language model, or of an encoder of a known family.

    Raises:
        LinearizeError: it is another encoder, an encoder-decoder, or a model without a language-model head.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    import linearize.families  # noqa: F401  (fills the registry)
    from linearize.registry import families

    names = config.architectures or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise LinearizeError(f"{where} is damaged: `architectures` in its config.json is no list of names.")
    if config.model_type in families and not families.get(config.model_type).causal:
        if not names or any(name.endswith(MASKED) for name in names):
            return
        raise LinearizeError(
            f"{where} is an encoder without a masked-language-model head ({', '.join(names)}), which the stages train "
            "on; give the checkpoint that it was made from, such as bert-base-uncased."
        )
    classes = getattr(config, "auto_map", None)
    remote = isinstance(classes, dict) and "AutoModelForCausalLM" in classes
    causal = [name for name in names if name.endswith(CAUSAL)]
    if config.is_encoder_decoder:
        kind = "an encoder-decoder model"
    elif names and not causal:
        kind = f"an encoder-only model or one without a language-model head ({', '.join(names)})"
    elif getattr(config, "is_decoder", True) is False:
        kind = f"an encoder-only model ({config.model_type})"
    elif not remote and config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        kind = f"of type {config.model_type!r}, which has no causal language model in transformers"
    else:
        return
    raise LinearizeError(
        f"{where} is {kind}; only decoder-only language models, BERT and RoBERTa can be linearized. `linearize ls` "
        "lists some."
    )


def _config(folder: Path, trust_remote_code: bool, weights: bool = True) -> PretrainedConfig:
    """Return a folder's config after all checks that need no weights in memory."""
    from transformers import AutoConfig

    if weights:
        check_folder(folder)
    config = _read(AutoConfig, folder, str(folder), trust_remote_code=trust_remote_code)
    check_causal(config, str(folder))
    check_sizes(config, str(folder))
    return config


def _read(auto: Any, folder: Path, where: str, **options: Any) -> Any:
    """Return `auto.from_pretrained(folder)`; what it raises becomes one paragraph."""
    try:
        return auto.from_pretrained(folder, **options)
    except Exception as error:  # transformers and tokenizers raise many kinds, `Exception` itself among them
        raise LinearizeError(f"{where} cannot be read: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:400]
