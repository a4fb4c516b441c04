"""What a conversion leaves is a Hugging Face model: it loads with and without `linearize`, generates and trains."""

import copy
import importlib.util
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache

import linearize.modeling
from linearize.errors import LinearizeError
from linearize.mixers.parts import Fp32Part
from linearize.modeling.export import FILE_NAME, remote_code, save_checkpoint
from linearize.recipe import Recipe
from linearize.registry import families, gates
from linearize.surgery import convert

IDS = torch.randint(1, 61, (2, 40), generator=torch.Generator().manual_seed(2))
USER_GATE = """
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from linearize import register_gate
from linearize.mixers.parts import Fp32Part, HeadShape, fp32_parameter

HALF_LIFE = 30.0


@dataclass(frozen=True)
class Rate:
    half_life: float


@lru_cache(maxsize=None)
def rate(half_life):
    return Rate(math.log(2) / half_life)


def shrink(x: Tensor, by: Callable[[Tensor], Tensor] = softplus) -> Tensor:
    return -by(x)


@register_gate("test_half_life")
class HalfLife(Fp32Part):
    '''A gate that only its user has.'''

    def __init__(self, shape: HeadShape, *, half_life: float = HALF_LIFE) -> None:
        super().__init__()
        self.rate = rate(half_life)
        assert rate(half_life) is self.rate
        self.weight = fp32_parameter(shape.groups, shape.hidden, value=0.01)

    def forward(self, x, k):
        return shrink(nn.functional.linear(x.float(), self.weight)) * self.rate.half_life
"""


def recipe_mixer(name, **changes):
    return {**Recipe.from_yaml(name).mixer.model_dump(), **changes}


SHORT = {"size": 6, "sinks": 2}
LIGER = recipe_mixer("liger", window=SHORT)
LOLCATS = recipe_mixer("lolcats", window=SHORT)
PAPER_LOLCATS = recipe_mixer("paper/lolcats", window={"size": 6, "sinks": 0})
EVERYTHING = {**LIGER, "gate": {"name": "scalar"}, "output_norm": True, "output_gate": True, "overlap": False}
TERRACE = {**LOLCATS, "window": {"size": 4, "sinks": 0, "kind": "terrace"}}
MAMBAS = [recipe_mixer(name) for name in ("mamba", "paper/mamba1-llama", "paper/mamba2-llama")]
MXINT8 = {**recipe_mixer("gdn", window=SHORT), "cache_dtype": "mxint8"}
RETAIN = recipe_mixer(
    "liger", memory={"name": "retain", "slots": 5}, combine={"name": "joint"}, feature_map={"name": "identity"},
    gate={"name": "none"}, rotary=True, overlap=False, normalize=False, output_norm=False, window=SHORT,
)  # fmt: skip
EXACT = [(0, 1), (1, 0)]


@pytest.fixture(scope="module")
def make_student(random_teacher):
    def make(mixer=LIGER, family="llama", exact_heads=EXACT, **changes):
        model = random_teacher(family, **changes)
        convert(model, mixer, list(range(model.config.num_hidden_layers)), exact_heads)
        return model

    return make


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


def import_file(path, monkeypatch):
    """Import a user's file; what it registers as a gate is forgotten after the test."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, module)
    monkeypatch.setattr(gates, "_entries", dict(gates._entries))
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("family", families.names())
def test_a_checkpoint_loads_as_the_model_that_was_saved(make_student, tmp_path, family):
    mixer = LIGER if families.get(family).causal else recipe_mixer("lion")
    tied = {"tie_word_embeddings": True} if family == "qwen2" else {}
    model = make_student(mixer, family, **tied)
    save_checkpoint(model, None, tmp_path)
    loaded, report = linearize.modeling.auto_class(family).from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is linearize.modeling.classes_for(family).lm
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(logits(loaded), logits(model))
    assert AutoConfig.from_pretrained(tmp_path).linearize == model.config.linearize
    decoder = AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(decoder(IDS).last_hidden_state, model.base_model(IDS).last_hidden_state)


def test_parameters_keep_the_teachers_names(random_teacher, make_student):
    teacher, student = (set(model.state_dict()) for model in (random_teacher(), make_student()))
    assert teacher <= student
    assert all(".self_attn.mixer." in name for name in student - teacher)


@pytest.mark.parametrize("mixer", [LIGER, LOLCATS, EVERYTHING, {**LIGER, "gate": {"name": "fixed"}}, *MAMBAS])
def test_fp32_parts_survive_loading_in_bfloat16(make_student, tmp_path, mixer):
    model = make_student(mixer)
    save_checkpoint(model, None, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    expected = dict(model.named_modules())
    parts = [(name, part) for name, part in loaded.named_modules() if isinstance(part, Fp32Part)]
    more = {0: 1, 1: 2, 2: 2}.get(
        MAMBAS.index(mixer) if mixer in MAMBAS else -1, 0
    )  # convolution, and Mamba's own skip
    assert len(parts) == 2 * (3 + more)
    for name, part in parts:
        for key, tensor in part.state_dict().items():
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, expected[name].state_dict()[key]), f"{name}.{key}"
    assert loaded.model.layers[0].self_attn.q_proj.weight.dtype == torch.bfloat16


REMOTE = """
import json, sys, torch
sys.modules["linearize"] = None
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
torch.set_num_threads(1)
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert model.__module__.startswith("transformers_modules"), model.__module__
    ids = load_file(folder + "/ids.safetensors")["ids"]
    padded = torch.ones_like(ids)
    padded[1, :4] = 0
    with torch.no_grad():
        results = {
            "logits": model(ids).logits,
            "greedy": model.generate(ids[:, :9], attention_mask=padded[:, :9], max_new_tokens=12, do_sample=False),
            "hidden": AutoModel.from_pretrained(folder, trust_remote_code=True)(ids).last_hidden_state,
        }
    save_file(results, folder + "/results.safetensors")
    model.save_pretrained(folder + "/again")
"""


def run_remote(folders, tmp_path):
    """Load checkpoints in a process in which `linearize` cannot be imported."""
    for folder in folders:
        save_file({"ids": IDS}, folder / "ids.safetensors")
    return subprocess.run(
        [sys.executable, "-c", REMOTE, *map(str, folders)],
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )


def test_checkpoints_load_where_linearize_is_not_installed(make_student, tmp_path, monkeypatch):
    (tmp_path / "my_gates.py").write_text(USER_GATE, encoding="utf-8")
    import_file(tmp_path / "my_gates.py", monkeypatch)
    models = {
        "liger": make_student(),
        "lolcats": make_student(LOLCATS, "mistral", sliding_window=8),
        "paper": make_student(PAPER_LOLCATS, "qwen2", tie_word_embeddings=True),
        "everything": make_student(EVERYTHING, "qwen3"),
        "terrace": make_student(TERRACE),
        "retain": make_student(RETAIN),
        "mxint8": make_student(MXINT8),
        "mamba1": make_student(MAMBAS[1], "qwen2"),
        "mamba2": make_student(MAMBAS[2], "qwen3"),
        "user": make_student({**LIGER, "gate": {"name": "test_half_life", "half_life": 12.0}}),
    }
    for name, model in models.items():
        save_checkpoint(model, None, tmp_path / name)
    done = run_remote([tmp_path / name for name in models], tmp_path)
    assert done.returncode == 0, done.stderr
    mask = torch.ones_like(IDS[:, :9])
    mask[1, :4] = 0
    for name, model in models.items():
        results = load_file(tmp_path / name / "results.safetensors")
        assert torch.equal(results["logits"], logits(model)), name
        with torch.no_grad():
            assert torch.equal(results["hidden"], model.model(IDS).last_hidden_state), name
        greedy = model.generate(IDS[:, :9], attention_mask=mask, max_new_tokens=12, do_sample=False)
        assert torch.equal(results["greedy"], greedy), name


def test_the_remote_file_imports_neither_linearize_nor_more_than_it_must():
    text = remote_code("llama", LIGER)
    compile(text, FILE_NAME, "exec")
    roots = {line.split()[1].split(".")[0] for line in text.splitlines() if line.startswith(("import ", "from "))}
    assert roots - {"torch", "transformers"} <= set(sys.stdlib_module_names)


def test_a_local_registration_wins_over_remote_code(make_student, tmp_path):
    save_checkpoint(make_student(), None, tmp_path)
    (tmp_path / FILE_NAME).write_text("raise RuntimeError('the remote file was read')", encoding="utf-8")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded).__module__ == "linearize.modeling.classes"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("torch.zeros(k.shape[:-1])", "source is not at hand"),
        ("TABLE[0] * torch.ones(k.shape[:-1])", "TABLE"),
        ("CHUNK * torch.ones(k.shape[:-1])", "CHUNK.*rename"),
        ("helpers.decay(k)", "helpers"),
    ],
)
def test_saving_a_part_that_cannot_be_written_names_the_part(make_student, tmp_path, monkeypatch, body, words):
    source = textwrap.dedent(f"""
        import torch
        from linearize import register_gate
        from linearize.mixers.parts import Fp32Part

        import helpers

        TABLE = torch.tensor([-1.0])
        CHUNK = -1.0  # linearize has another constant of this name

        @register_gate("test_hidden")
        class Hidden(Fp32Part):
            def __init__(self, shape):
                super().__init__()

            def forward(self, x, k):
                return {body}
    """)
    (tmp_path / "helpers.py").write_text("def decay(k): return -k.abs()", encoding="utf-8")
    import_file(tmp_path / "helpers.py", monkeypatch)
    path = tmp_path / "hidden_gates.py"
    path.write_text(source, encoding="utf-8")
    import_file(path, monkeypatch)
    model = make_student({**LIGER, "gate": {"name": "test_hidden"}})
    if "source" in words:
        path.unlink()
    with pytest.raises(LinearizeError, match=f"(?s)gate 'test_hidden'.*{words}"):
        save_checkpoint(model, None, tmp_path / "checkpoint")


def test_a_part_written_in_a_session_is_named_too(make_student, tmp_path, monkeypatch):
    monkeypatch.setattr(gates, "_entries", dict(gates._entries))
    scope = {"__name__": "session"}
    exec(USER_GATE.replace("@lru_cache(maxsize=None)", "").replace("assert", "#"), scope)
    model = make_student({**LIGER, "gate": {"name": "test_half_life"}})
    with pytest.raises(LinearizeError, match="gate 'test_half_life'"):
        save_checkpoint(model, None, tmp_path)


GREEDY = {"max_new_tokens": 14, "do_sample": False}


def left_padded():
    """A batch of a plain row of 9 tokens and a row of 5 behind 4 of padding, with its mask."""
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    return IDS[:, :9], mask


@pytest.fixture(scope="module", params=["liger", "lolcats", "everything"])
def student(request, make_student):
    return make_student({"liger": LIGER, "lolcats": LOLCATS, "everything": EVERYTHING}[request.param])


@pytest.mark.parametrize("length", [1, 2, 7, 40])
def test_greedy_generation_is_the_argmax_of_the_full_forward(student, length):
    got = student.generate(IDS[:, :length], **GREEDY)
    ids = IDS[:, :length]
    for _ in range(GREEDY["max_new_tokens"]):
        with torch.no_grad():
            ids = torch.cat([ids, student(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(got, ids)


def test_generation_from_a_prompt_many_times_the_window(student):
    ids = torch.randint(1, 61, (1, 300), generator=torch.Generator().manual_seed(6))
    assert torch.equal(student.generate(ids, **GREEDY), student.generate(ids, use_cache=False, **GREEDY))


def test_a_left_padded_batch_generates_what_its_rows_do_alone(student):
    ids, mask = left_padded()
    got = student.generate(ids, attention_mask=mask, **GREEDY)
    assert torch.equal(got[:1], student.generate(ids[:1], **GREEDY))
    assert torch.equal(got[1:, 4:], student.generate(ids[1:, 4:], **GREEDY))


@pytest.mark.parametrize(
    "mode",
    [
        {"num_beams": 3, "do_sample": False},
        {"num_beams": 2, "do_sample": True},
        {"do_sample": True, "num_return_sequences": 3},
        {"do_sample": True, "top_k": 5, "temperature": 0.7},
    ],
)
def test_beams_and_samples_are_those_without_a_cache(student, mode):
    ids, mask = left_padded()
    results = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        results.append(student.generate(ids, attention_mask=mask, max_new_tokens=14, use_cache=use_cache, **mode))
    assert torch.equal(*results)
    assert results[0].shape == (2 * mode.get("num_return_sequences", 1), 23)


def test_a_static_cache_generates_the_same(student):
    ids, mask = left_padded()
    dynamic = student.generate(ids, attention_mask=mask, **GREEDY)
    assert torch.equal(student.generate(ids, attention_mask=mask, cache_implementation="static", **GREEDY), dynamic)


def test_a_kind_of_cache_that_is_not_served_is_an_error(student):
    with pytest.raises(ValueError, match=r"quantized.*dynamic"):
        student.generate(IDS[:, :5], cache_implementation="quantized", **GREEDY)
    with pytest.raises(LinearizeError, match="DynamicCache"):
        student(IDS, past_key_values=DynamicCache())


def test_turns_of_a_conversation_continue_from_the_cache(student):
    first = student.generate(IDS[:1, :9], return_dict_in_generate=True, **GREEDY)
    said = torch.cat([first.sequences, IDS[1:, :8]], 1)
    second = student.generate(said, past_key_values=first.past_key_values, return_dict_in_generate=True, **GREEDY)
    third = student.generate(
        torch.cat([second.sequences, IDS[1:, 8:9]], 1), past_key_values=second.past_key_values, **GREEDY
    )
    plain = student.generate(said, use_cache=False, **GREEDY)
    assert torch.equal(second.sequences, plain)
    assert torch.equal(third, student.generate(torch.cat([plain, IDS[1:, 8:9]], 1), use_cache=False, **GREEDY))


def test_generation_from_embeddings(student):
    embedded = student.get_input_embeddings()(IDS[:, :9])
    got = student.generate(inputs_embeds=embedded, **GREEDY)
    assert torch.equal(got, student.generate(IDS[:, :9], **GREEDY)[:, 9:])


def test_positions_given_once_serve_all_rows(student):
    with torch.no_grad():
        got = student(IDS, position_ids=torch.arange(40)[None], attention_mask=torch.ones_like(IDS).bool()).logits
    torch.testing.assert_close(got, logits(student), rtol=0, atol=1e-5)


def test_inner_padding_with_plain_positions_begins_no_document(student):
    """The gap that padding leaves in `position_ids` is no restart: the tokens before it stay visible."""
    mask = torch.ones(1, 40, dtype=torch.long)
    mask[0, 10:15] = 0
    ids = IDS[:1].clone()
    with torch.no_grad():
        before = student(ids, attention_mask=mask, position_ids=torch.arange(40)[None]).logits[0, 16]
        ids[0, 9] = (ids[0, 9] + 1) % 61
        after = student(ids, attention_mask=mask, position_ids=torch.arange(40)[None]).logits[0, 16]
    assert not torch.allclose(before, after, atol=1e-4)


def test_hidden_states_are_returned_after_a_teacher_returned_its_own(random_teacher):
    model = random_teacher()
    with torch.no_grad():
        teacher = model(IDS, output_hidden_states=True).hidden_states
        convert(model, {**LIGER, "window": {"size": 40, "sinks": 0}, "combine": {"name": "window_only"}})
        out = model(IDS, output_hidden_states=True)
        loaded = type(model)(model.config).eval()(IDS, output_hidden_states=True)
    assert len(loaded.hidden_states) == len(out.hidden_states) == len(teacher) == 3
    for got, expected in zip(out.hidden_states, teacher, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_a_configuration_without_its_entry_is_explained():
    made = linearize.modeling.classes_for("llama")
    sizes = {
        "hidden_size": 8,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "vocab_size": 11,
        "intermediate_size": 8,
    }
    with pytest.raises(LinearizeError, match=r"linearize.*convert"):
        made.lm(made.config(**sizes))


def test_a_copy_is_the_same_model(student):
    assert torch.equal(logits(copy.deepcopy(student)), logits(student))


@pytest.mark.parametrize("mixer", [LIGER, LOLCATS, TERRACE, MXINT8, *MAMBAS])
def test_a_decode_step_compiles_into_one_graph(make_student, mixer):
    model = make_student(mixer)
    step = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        cache = model(IDS[:, :10], use_cache=True).past_key_values
        for t in range(10, 14):
            got = step(
                IDS[:, t : t + 1], past_key_values=cache, use_cache=True, position_ids=torch.full((2, 1), t)
            ).logits
            torch.testing.assert_close(got, model(IDS[:, : t + 1]).logits[:, -1:], rtol=0, atol=1e-4)


def test_the_padding_free_collator_of_transformers_keeps_documents_apart(student):
    from transformers import DataCollatorWithFlattening

    documents = [IDS[0, :17], IDS[1, :23]]
    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=True)([{"input_ids": d.tolist()} for d in documents])
    with torch.no_grad():
        got = student(**batch).logits
    torch.testing.assert_close(got, torch.cat([logits(student, d[None]) for d in documents], 1), rtol=0, atol=1e-4)


def test_a_mask_that_is_no_padding_mask_is_refused(student):
    with pytest.raises(ValueError, match=r"\[batch, tokens\]"):
        student(IDS, attention_mask=torch.ones(2, 1, 40, 40))


def gradients(model, train=True, **kwargs):
    model.train(train)
    model.zero_grad()
    loss = model(IDS, labels=IDS, **kwargs).loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.eval().zero_grad()
    return loss.item(), found


def test_every_parameter_gets_a_gradient_with_and_without_a_cache(student):
    loss, found = gradients(student, use_cache=False)
    assert set(found) == {name for name, _ in student.named_parameters()}
    again, cached = gradients(student, use_cache=True)
    assert again == pytest.approx(loss, abs=1e-6)
    for name in found:
        torch.testing.assert_close(cached[name], found[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(make_student, reentrant):
    model = make_student(EVERYTHING)
    loss, plain = gradients(model, use_cache=False)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    again, checkpointed = gradients(model)
    assert again == loss
    assert set(checkpointed) == set(plain)
    for name in plain:
        torch.testing.assert_close(checkpointed[name], plain[name], rtol=0, atol=1e-6, msg=name)


def test_training_under_autocast_matches_fp32(make_student):
    model = make_student(EVERYTHING)
    loss, _ = gradients(model, use_cache=False)
    with torch.autocast("cpu", torch.bfloat16):
        cast, found = gradients(model, use_cache=False)
    assert cast == pytest.approx(loss, rel=0.02)
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in found.values())


def test_peft_wraps_and_trains_and_merges(make_student):
    from peft import LoraConfig, get_peft_model

    model = make_student()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = LoraConfig(
        r=2, lora_alpha=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM"
    )
    wrapped = get_peft_model(model, config)
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    assert len(trained) == 2 * 4 * 2
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(5):
        loss = wrapped(input_ids=IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    wrapped.eval()
    expected = logits(wrapped)
    assert wrapped.generate(input_ids=IDS[:, :5], **GREEDY).shape == (2, 19)
    merged = wrapped.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-4)
    changed = {name for name, p in merged.named_parameters() if not torch.equal(p, before[name])}
    projections = ("q_proj", "k_proj", "v_proj", "o_proj")
    assert changed == {f"model.layers.{i}.self_attn.{p}.weight" for i in range(2) for p in projections}


def test_trainer_trains_saves_and_the_result_loads(make_student, tmp_path):
    from transformers import Trainer, TrainingArguments

    model = make_student()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    trainer.save_model(str(tmp_path / "final"))
    model.eval()
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "final")), logits(model))
