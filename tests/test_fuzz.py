"""Damaged and forged input: one paragraph or a result, never a traceback, a hang or an endless allocation.

`make test` tries the same few hundred inputs every time; `make soak` tries many more, new ones each time.
"""

import json
import os
import re
import resource
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from linearize import yaml_io
from linearize.api import plan
from linearize.errors import LinearizeError
from linearize.mixers import check_mixer
from linearize.recipe import RECIPES, Recipe, recipe_names
from linearize.teacher import load_config, load_teacher, resolve
from linearize.weights import check_folder, check_gguf, check_safetensors

EXAMPLES = int(os.environ.get("LINEARIZE_FUZZ", "0"))  # 0: the same few each time
BOUNDS = settings(
    max_examples=EXAMPLES or 40,
    derandomize=not EXAMPLES,
    deadline=20_000,
    database=None,
    suppress_health_check=[*HealthCheck],
)
MEMORY = 2**30  # bytes that a test may add, torch and its models' code included

LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.sampled_from([0, 1, -1, 2**31, 2**63, 10**12, 10**18]),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(["../../x", "/etc/passwd", "\x00", "{x", "softmax", "all", "1e400", "!!python/none ''"]),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.sampled_from(["name", "size", "every", "keep", "cache", "x"]), st.integers(0, 9), max_size=2),
)


@pytest.fixture(autouse=True)
def bounded_memory() -> Iterator[None]:
    """What the inputs ask for is not allocated."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert grown < MEMORY, f"the process grew by {grown:,} bytes"


def paragraph_or_result(call: Callable[[], Any]) -> Any:
    """Return what the call gives, or None where it refuses in one paragraph."""
    try:
        return call()
    except LinearizeError as error:
        words = str(error)
    assert words and not re.search(r"[\n\r\t\x00]", words), words
    return None


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value in nested dicts and lists."""
    yield path
    for key, entry in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(entry, (*path, key))


@st.composite
def altered(draw: Any, values: list[Any]) -> Any:
    """One of the values with a few of its entries replaced, added or removed."""
    value = json.loads(json.dumps(draw(st.sampled_from(values))))
    for _ in range(draw(st.integers(1, 3))):
        found = [path for path in places(value) if path]
        if not found:
            break
        path = draw(st.sampled_from(found))
        node = value
        for key in path[:-1]:
            node = node[key]
        if draw(st.integers(0, 4)) == 0:
            del node[path[-1]]
        else:
            node[path[-1]] = draw(LEAVES)
    return value


def damaged(content: bytes) -> st.SearchStrategy[bytes]:
    """The content with a few bytes or 8-byte numbers overwritten, cut or repeated."""

    @st.composite
    def build(draw: Any) -> bytes:
        data = bytearray(content)
        for _ in range(draw(st.integers(1, 4))):
            at = draw(st.integers(0, min(len(data) - 1, 2000)))
            kind = draw(st.sampled_from(["byte", "number", "cut", "insert"]))
            if kind == "byte":
                data[at] = draw(st.integers(0, 255))
            elif kind == "number":
                data[at : at + 8] = struct.pack("<Q", draw(st.sampled_from([0, 2**31, 2**40, 2**62, 2**64 - 1])))
            elif kind == "cut" and at > 8:
                del data[at:]
            else:
                data[at:at] = draw(st.binary(max_size=16))
        return bytes(data)

    return build()


RECIPE_VALUES = [yaml_io.read(RECIPES / f"{name}.yaml") for name in recipe_names()]
RECIPE_TEXTS = [(RECIPES / f"{name}.yaml").read_bytes() for name in recipe_names()]


@BOUNDS
@given(text=st.one_of(st.sampled_from(RECIPE_TEXTS).flatmap(damaged), st.binary(max_size=200)))
def test_recipe_text(text: bytes, tmp_path_factory: Any) -> None:
    file = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    file.write_bytes(text)
    paragraph_or_result(lambda: Recipe.from_yaml(file))


@BOUNDS
@given(value=altered(RECIPE_VALUES))
def test_recipe_value(value: Any, tiny: Path) -> None:
    def use() -> None:
        recipe = Recipe.parse(yaml_io.parse(yaml_io.dump(value), "fuzz.yaml"), "fuzz.yaml")
        if recipe.mixer is not None:
            check_mixer(recipe.mixer.model_dump(), causal=recipe.causal)
        plan(str(tiny), recipe, overrides=["data.length=64"]).render()

    paragraph_or_result(use)


@BOUNDS
@given(
    settings=st.lists(st.tuples(st.text(max_size=12), LEAVES), max_size=3), key=st.sampled_from(["data", "mixer.gate"])
)
def test_override(settings: list[tuple[str, Any]], key: str) -> None:
    words = [f"{key}.{name}={value}" for name, value in settings] + [f"{name}={value}" for name, value in settings]
    for word in words:
        paragraph_or_result(lambda word=word: Recipe.from_yaml("liger", [word]))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, save_teacher: Any) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher"))


@BOUNDS
@given(data=st.data())
def test_config(data: Any, tiny: Path, tmp_path_factory: Any) -> None:
    config = data.draw(altered([json.loads((tiny / "config.json").read_text())]))
    folder = tmp_path_factory.getbasetemp() / "fuzz-config"
    folder.mkdir(exist_ok=True)
    for file in tiny.iterdir():
        if not (folder / file.name).exists():
            (folder / file.name).symlink_to(file)
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    paragraph_or_result(lambda: plan(str(folder), "liger", overrides=["data.length=64"]))
    if data.draw(st.integers(0, 3)) == 0:
        paragraph_or_result(lambda: load_teacher(resolve(str(folder)), torch.float32, "cpu"))


@pytest.fixture(scope="module")
def tensors(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    file = tmp_path_factory.mktemp("tensors") / "model.safetensors"
    save_file({"a": torch.zeros(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}, file, {"format": "pt"})
    return file.read_bytes()


@BOUNDS
@given(data=st.data())
def test_tensors(data: Any, tensors: bytes, tmp_path_factory: Any) -> None:
    file = tmp_path_factory.getbasetemp() / "model.safetensors"
    header = json.loads(tensors[8 : 8 + struct.unpack("<Q", tensors[:8])[0]])
    if data.draw(st.booleans()):
        file.write_bytes(data.draw(damaged(tensors)))
    else:
        text = json.dumps(data.draw(altered([header]))).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(32))
    paragraph_or_result(lambda: check_safetensors(file))


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    file = tmp_path_factory.mktemp("gguf") / "a.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(16)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["a", "b", "c", "d"])
    writer.add_token_scores([0.0] * 4)
    writer.add_token_types([1] * 4)
    for name, shape in {"token_embd.weight": (4, 8), "blk.0.attn_q.weight": (8, 8)}.items():
        writer.add_tensor(name, np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    check_gguf(file)
    return file.read_bytes()


@BOUNDS
@given(data=st.data())
def test_packed(data: Any, packed: bytes, tmp_path_factory: Any) -> None:
    file = tmp_path_factory.getbasetemp() / "fuzz.gguf"
    file.write_bytes(data.draw(damaged(packed)))
    paragraph_or_result(lambda: check_gguf(file))
    paragraph_or_result(lambda: plan(str(file), "liger", overrides=["data.length=8"]))


@pytest.mark.parametrize("kind", ["laughs", "endless", "deep", "object", "large", "digits"])
def test_forged_yaml(kind: str, tmp_path: Path) -> None:
    laughs = "a: &a [x, x, x, x, x, x, x, x, x, x]\n"
    laughs += "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
    texts = {
        "laughs": (laughs, "100,000 values"),
        "endless": ("a: &a [*a]", "refers to what it stands in"),
        "deep": ("[" * 2_000, "nested too deeply"),
        "object": ("!!python/object/apply:os.system ['touch pwned']", "python/object"),
        "large": ("# " + "x" * 2**21, "bytes"),
        "digits": ("name: " + "9" * 5000, "not YAML"),
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(texts[kind][0])
    with pytest.raises(LinearizeError, match=texts[kind][1]):
        Recipe.from_yaml(file)
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def forge_gguf(tensors: int = 0, entries: int = 0, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, entries) + rest


def entry(kind: int, value: bytes, name: bytes = b"general.x") -> bytes:
    return struct.pack("<Q", len(name)) + name + struct.pack("<I", kind) + value


FORGED_GGUF = {
    "tensors": forge_gguf(tensors=2**62),
    "entries": forge_gguf(entries=2**62),
    "string": forge_gguf(entries=1, rest=entry(8, struct.pack("<Q", 2**62))),
    "array": forge_gguf(entries=1, rest=entry(9, struct.pack("<IQ", 4, 2**62))),
    "nested": forge_gguf(entries=1, rest=entry(9, struct.pack("<IQ", 9, 2**20)) + bytes(64)),
    "dimensions": forge_gguf(tensors=1, rest=struct.pack("<QI", 0, 2**31) + bytes(64)),
    "overlap": forge_gguf(tensors=9, rest=9 * struct.pack("<QIQIQ", 0, 1, 64, 0, 0) + bytes(400)),
    "end": forge_gguf(tensors=1, rest=struct.pack("<QIQIQ", 0, 1, 64, 0, 2**40) + bytes(400)),
    "shape": forge_gguf(tensors=1, rest=struct.pack("<QIQQIQ", 0, 2, 2**40, 2**40, 0, 0) + bytes(64)),
}


@pytest.mark.parametrize("kind", FORGED_GGUF)
def test_forged_gguf(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "a.gguf"
    file.write_bytes(FORGED_GGUF[kind])
    with pytest.raises(LinearizeError, match="damaged or cut short"):
        check_gguf(file)


@pytest.mark.parametrize(
    "header", [b"[" * 50_000, b'{"a": {"data_offsets": [0, 8], "shape": [4611686018427387904]}}', b"[]"]
)
def test_forged_safetensors(header: bytes, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(LinearizeError, match="damaged"):
        check_safetensors(file)
    file.write_bytes(struct.pack("<Q", 2**63))
    with pytest.raises(LinearizeError, match="past the end"):
        check_safetensors(file)


@pytest.mark.parametrize(
    "changes",
    [{"num_hidden_layers": 10**9}, {"vocab_size": 2**60}, {"hidden_size": 2**19, "intermediate_size": 2**19}],
)
def test_a_config_cannot_ask_for_more_than_the_weights_hold(changes: dict[str, int], make_teacher: Any) -> None:
    folder = make_teacher()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(LinearizeError, match=r"damaged|lack"):
        load_teacher(resolve(str(folder)), torch.float32, "cpu")


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", 7, ["x"], None])
def test_an_index_cannot_name_a_file_outside_its_folder(name: Any, make_teacher: Any) -> None:
    folder = make_teacher()
    (folder.parent / "secret.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    with pytest.raises(LinearizeError, match="beside it is expected"):
        check_folder(folder)
    with pytest.raises(LinearizeError):
        load_config(resolve(str(folder)))
