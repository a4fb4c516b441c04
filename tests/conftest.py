"""Tiny teachers made on the fly, and no network for anything that would look for one."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

VOCABULARY = 272


def build_config(family: str = "llama", **changes: object) -> object:
    """A 2-layer config of a family: hidden 64, 4 query heads, 2 KV heads where the family has fewer of them."""
    from transformers import CONFIG_MAPPING

    settings: dict[str, object] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    experts = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    has = {**CONFIG_MAPPING[family]().to_dict(), **CONFIG_MAPPING[family].attribute_map}
    settings.update({key: value for key, value in experts.items() if key in has})
    settings.update(changes)
    if "num_kv_heads" in has:  # Falcon
        settings["num_kv_heads"] = settings["num_key_value_heads"]
        settings.setdefault("new_decoder_architecture", settings["num_kv_heads"] != settings["num_attention_heads"])
        settings.setdefault("multi_query", False)
        settings.setdefault("ffn_hidden_size", settings["intermediate_size"])
    for name in ("num_key_value_heads", "intermediate_size"):
        if name not in has:
            settings.pop(name)
    if isinstance(has.get("layer_types"), list) and "sliding_window_pattern" not in changes and "gemma" in family:
        settings.setdefault("layer_types", ["sliding_attention", "full_attention"] * settings["num_hidden_layers"])
        settings["layer_types"] = settings["layer_types"][: settings["num_hidden_layers"]]
        settings.setdefault("sliding_window", 8)
    return CONFIG_MAPPING[family](**settings)


def build_tokenizer(mask: bool = False) -> object:
    """A byte-level tokenizer: one token a byte, four special ones first, an encoder's mask last."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    symbols = ["<pad>", "<s>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(symbols)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if mask:
        special["mask_token"] = "<mask>"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def write_teacher(folder: Path, family: str = "llama", seed: int = 0, **changes: object) -> Path:
    """Save a random tiny model of a family with its tokenizer, in fp32."""
    import torch

    from linearize.modeling import auto_class

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = auto_class(family).from_config(build_config(family, **changes))
    model.save_pretrained(folder)
    build_tokenizer(mask=auto_class(family).__name__ == "AutoModelForMaskedLM").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def byte_tokenizer() -> object:
    """The tokenizer of the tiny teachers: one token a byte."""
    return build_tokenizer()


@pytest.fixture
def make_teacher(tmp_path: Path) -> Callable[..., Path]:
    """Write a tiny teacher to a new folder: `make_teacher("name", family="qwen3", num_hidden_layers=3)`."""

    def make(name: str = "teacher", **options: object) -> Path:
        return write_teacher(tmp_path / name, **options)

    return make


@pytest.fixture(scope="session")
def save_teacher() -> Callable[..., Path]:
    """`write_teacher`, for fixtures that outlive a test: `save_teacher(folder, initializer_range=0.3)`."""
    return write_teacher


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder for teachers."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("LINEARIZE_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def random_teacher() -> Callable[..., Any]:
    """Build two layers whose every parameter is random, biases and norms too: `random_teacher("qwen3", (9, 3), 80)`."""
    import torch
    from transformers import CONFIG_MAPPING

    torch.set_num_threads(1)

    def make(
        family: str = "llama", heads: tuple[int, int] = (4, 2), head_dim: int = 16, seed: int = 0, **changes: object
    ) -> Any:
        sizes = {
            "vocab_size": 61,
            "hidden_size": -(-32 // heads[0]) * heads[0],  # a multiple of the heads
            "intermediate_size": 32,
            "num_attention_heads": heads[0],
            "num_key_value_heads": heads[1],
            "head_dim": head_dim,
            "max_position_embeddings": 4096,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": 0 if family == "roberta" else None,  # which counts positions from behind it
        }
        if not hasattr(CONFIG_MAPPING[family], "num_key_value_heads"):  # nor can its head dim be chosen
            sizes["hidden_size"] = heads[0] * head_dim
            del sizes["head_dim"]
        config = build_config(family, **{**sizes, **changes})
        from linearize.modeling import auto_class

        capped = getattr(config, "attn_logit_softcapping", None)  # which SDPA does not have
        options = {"attn_implementation": "eager"} if capped else {}
        model = auto_class(family).from_config(config, dtype=torch.float32, **options)
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            noise = 0.2 * torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(noise if parameter.dim() > 1 else noise + (parameter.data == 1))
        return model.eval()

    return make


@pytest.fixture(scope="session")
def make_mixer() -> Callable[..., dict[str, Any]]:
    """Build a recipe's mixer as plain data; what is not named has the recipe's defaults: `make_mixer(gate="key")`."""
    from linearize.recipe_mixer import Mixer

    return lambda **fields: Mixer.model_validate(fields).model_dump()


@pytest.fixture
def tiny_config() -> Callable[..., object]:
    """Return configs of tiny models: `tiny_config("qwen3", num_hidden_layers=3)`."""
    return build_config
