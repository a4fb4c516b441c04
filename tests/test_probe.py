"""The probe: finds a planted retrieval head, agrees with surgery, computes nothing twice, and chooses in a run."""

import json
from dataclasses import asdict, replace

import pytest
import torch
import yaml
from transformers import AutoConfig

from linearize import api
from linearize import probe as probing
from linearize.api import linearize, load, plan
from linearize.errors import LinearizeError
from linearize.eval.controls import applicable, memory_silenced
from linearize.eval.recall import Sample, score
from linearize.evaluation import evaluate_folder
from linearize.generation import generate_text
from linearize.head_scores import (
    ProbeScores,
    UnitScore,
    choose_heads,
    choose_layers,
    choose_windows,
    halo_scores,
    with_halo,
)
from linearize.mixers.exact import ExactAttention
from linearize.mixers.mixer import TokenMixer
from linearize.planning import make_plan, resolve_heads
from linearize.probe import probe_lengths, rank_together, run_probe, score_layers, score_units
from linearize.recipe import Recipe
from linearize.registry import families
from linearize.surgery import convert

WINDOW = {"size": 16, "sinks": 2}
MARKER, SECRETS = 60, range(40, 56)


@pytest.fixture
def planted(random_teacher):
    """Two layers of two KV heads. KV head 1 of layer 1 looks from the marker back at a secret token and repeats it."""
    model = random_teacher("llama", (4, 2), 16, rope_parameters={"rope_theta": 1e12, "rope_type": "default"})
    width = model.config.hidden_size
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.05 if parameter.dim() > 1 else 1)
        embedding, attention = model.model.embed_tokens.weight, model.model.layers[1].self_attn
        embedding[:, :18] = 0
        embedding[MARKER, 16] = embedding[list(SECRETS), 17] = 1
        embedding[list(SECRETS), :16] = torch.eye(16)
        slow = 16 + 7  # a channel of KV head 1 that the rotary embedding hardly turns
        for query in (2, 3):
            attention.q_proj.weight[query * 16 : query * 16 + 16] = 0
            attention.q_proj.weight[query * 16 + 7, 16] = 10
            attention.o_proj.weight[:16, query * 16 : query * 16 + 16] = torch.eye(16)
        attention.k_proj.weight[16:32] = 0
        attention.k_proj.weight[slow, 17] = 10
        attention.v_proj.weight[16:32] = torch.eye(16, width)
        model.lm_head.weight[:, :18] = 0
        model.lm_head.weight[list(SECRETS), :16] = 8 * torch.eye(16)
    return model


def hidden(places: dict[int, int], length: int = 96) -> Sample:
    """A text of filler tokens with secrets at some places, then the marker, then the answer: the first secret."""
    generator = torch.Generator().manual_seed(sum(places))
    ids = torch.randint(0, 40, (length - 2,), generator=generator).tolist()
    for place, secret in places.items():
        ids[place] = secret
    return Sample((*ids, MARKER), (next(iter(places.values())),), 0.5, (True,))


SAMPLES = [hidden({20: 41}), hidden({30: 47}), hidden({50: 52}), hidden({9: 44}, 64)]


def test_a_planted_retrieval_head_comes_first(planted):
    assert score(planted, SAMPLES).accuracy == 1
    teacher, units = score_units(planted, [(sample, True) for sample in SAMPLES], WINDOW)
    heads = [unit for unit in units if unit.head is not None]
    assert teacher["accuracy"] == 1
    best, *others = sorted(heads, key=lambda unit: -unit.recall)
    assert (best.layer, best.head) == (1, 1)
    assert best.recall > 2 and best.accuracy >= 0.5  # what else is the first choice may be right by chance
    assert all(abs(unit.recall) < 0.1 and unit.accuracy == 0 for unit in others)
    whole = {unit.layer: unit.recall for unit in units if unit.head is None}
    assert whole[1] > 2 > 0.1 > abs(whole[0])


@pytest.mark.parametrize("family", [name for name in families.names() if families.get(name).causal])
def test_a_candidate_is_what_surgery_makes(random_teacher, family):
    """With one KV head, or one layer, on the window and every other head exact."""
    model = random_teacher(family, (4, 2), 16)
    groups = families.get(family).heads(None, model.config)[1]
    teacher, units = score_units(model, [(sample, True) for sample in SAMPLES], WINDOW)
    assert teacher["log_prob"] == pytest.approx(score(model, SAMPLES).log_prob, abs=1e-4)
    mixer = Recipe.parse({"name": "w", "mixer": {"window": WINDOW, "combine": "window_only"}}, "w").mixer
    everything = [(layer, head) for layer in range(2) for head in range(groups)]
    assert len(units) == 2 * (groups + 1)
    for unit in units:
        kept = [pair for pair in everything if pair[0] != unit.layer or unit.head not in (None, pair[1])]
        surgery = convert(model, mixer.model_dump(), [0, 1], exact_heads=kept)
        drop = teacher["log_prob"] - score(model, SAMPLES).log_prob
        surgery.undo()
        assert unit.recall == pytest.approx(drop, abs=1e-4), unit
        assert unit.kl > 0 and unit.transfer > 0


@pytest.fixture
def twins(planted):
    """The planted head twice: KV head 0 of layer 1 is its copy, so that either alone can be lost."""
    attention = planted.model.layers[1].self_attn
    with torch.no_grad():
        for projection in (attention.k_proj, attention.v_proj):
            projection.weight[:16] = projection.weight[16:]
        attention.q_proj.weight[:32] = attention.q_proj.weight[32:]
        attention.o_proj.weight[:, :32] = attention.o_proj.weight[:, 32:]
    return planted


def test_heads_that_stand_in_for_one_another_are_found_together(twins):
    samples = [(sample, True) for sample in SAMPLES]
    _, units = score_units(twins, samples, WINDOW)
    alone = {(unit.layer, unit.head): unit.recall for unit in units if unit.head is not None}
    assert max(alone.values()) < 0.1  # one at a time, no head is worth anything
    assert rank_together(twins, samples, WINDOW, sorted(alone))[0] in ((1, 0), (1, 1))


def test_together_a_candidate_is_what_surgery_makes(random_teacher):
    """Of three heads the one goes first without which the student that surgery makes is best, and so on."""
    model = random_teacher("llama", (4, 2), 16)
    mixer = Recipe.parse({"name": "w", "mixer": {"window": WINDOW, "combine": "window_only"}}, "w").mixer.model_dump()

    def without(kept, pair):
        surgery = convert(model, mixer, [0, 1], exact_heads=[other for other in kept if other != pair])
        log_prob = score(model, SAMPLES).log_prob
        surgery.undo()
        return log_prob

    kept, order = [(0, 1), (1, 0), (1, 1)], []
    while kept:
        order.insert(0, max(kept, key=lambda pair: without(kept, pair)))
        kept.remove(order[0])
    samples = [(sample, True) for sample in SAMPLES]
    assert rank_together(model, samples, WINDOW, [(1, 1), (0, 1), (1, 0)]) == tuple(order)
    assert not any("forward" in vars(module) for module in model.modules())


def test_the_teacher_is_left_as_it_was(random_teacher):
    model = random_teacher()
    ids = torch.arange(40)[None]
    before = model(ids).logits
    score_units(model, [(SAMPLES[0], False)], WINDOW)
    assert torch.equal(model(ids).logits, before)
    assert not any("forward" in vars(module) for module in model.modules())


def test_each_branch_is_computed_once_a_layer_and_no_layer_below_runs_again(random_teacher, monkeypatch):
    model = random_teacher(num_hidden_layers=3)
    calls = {"exact": 0, "window": 0, "mlp": 0}

    def counted(cls, name):
        forward = cls.forward

        def count(self, *args, **kwargs):
            calls[name] += args[0].shape[0]
            return forward(self, *args, **kwargs)

        monkeypatch.setattr(cls, "forward", count)

    counted(ExactAttention, "exact")
    counted(TokenMixer, "window")
    counted(type(model.model.layers[0].mlp), "mlp")
    rows, candidates = 2, 3  # of a layer: two KV heads, and the whole
    score_units(model, [(SAMPLES[0], True), (SAMPLES[1], True)], WINDOW)
    assert calls["exact"] == calls["window"] == 3 * rows
    assert calls["mlp"] == rows * (3 + candidates * (3 + 2 + 1))


def test_a_converted_layer_computes_each_head_in_one_branch(random_teacher, monkeypatch):
    model = random_teacher("llama", (6, 3), 16)
    mixer = Recipe.parse({"name": "w", "mixer": {"window": WINDOW, "combine": "window_only"}}, "w").mixer.model_dump()
    convert(model, mixer, exact_heads=[(0, 2), (1, 0), (1, 1)])
    seen = []
    exact, mixed = ExactAttention.forward, TokenMixer.forward

    def watch_exact(self, q, k, *args, **kwargs):
        seen.append(("exact", q.shape[2], k.shape[2]))
        return exact(self, q, k, *args, **kwargs)

    def watch_mixer(self, x, plain, rotated, v, *args, **kwargs):
        seen.append(("mixer", rotated[0].shape[2], v.shape[2]))
        return mixed(self, x, plain, rotated, v, *args, **kwargs)

    monkeypatch.setattr(ExactAttention, "forward", watch_exact)
    monkeypatch.setattr(TokenMixer, "forward", watch_mixer)
    model(torch.arange(20)[None])
    assert seen == [("exact", 2, 1), ("mixer", 4, 2), ("exact", 4, 2), ("mixer", 2, 1)]


def made(recall: list[list[float]], **other: list[list[float]]) -> ProbeScores:
    """Scores from tables of [layer][head]; a layer's own are the sums of its heads'."""
    tables = {"recall": recall, **other}
    units = []
    for layer, row in enumerate(recall):
        for head in [*range(len(row)), None]:
            values = {key: sum(table[layer]) if head is None else table[layer][head] for key, table in tables.items()}
            units.append(UnitScore(layer, head, **{"accuracy": 0, "kl": 0, "transfer": 0, "language": 0, **values}))
    window = {"size": 128, "sinks": 4}
    return ProbeScores("m", len(recall), len(recall[0]), window, {}, {}, with_halo(units))


def test_ranking_on_synthetic_scores():
    scores = made([[0.1, 5.0], [0.0, 0.3], [2.0, -1.0]], kl=[[0.9, 0.1], [0.2, 0.3], [0.0, 0.5]])
    assert scores.rank_heads("recall")[:3] == [(0, 1), (2, 0), (1, 1)]
    assert scores.rank_heads("kl")[:2] == [(0, 0), (2, 1)]
    assert scores.rank_layers("recall") == [0, 2, 1]
    assert replace(scores, joint=((1, 0), (0, 1))).rank_heads("joint")[:4] == [(1, 0), (0, 1), (2, 0), (1, 1)]
    heads = choose_heads(Recipe.parse({"name": "r", "exact_heads": {"keep": 2}}, "r"), scores, 2)
    assert heads.exact_heads == [(0, 1), (2, 0)] and not heads.probed
    both = Recipe.parse({"name": "r", "layers": {"keep": 0.34, "by": "recall"}, "exact_heads": {"keep": 2}}, "r")
    layers = choose_layers(both, scores)
    assert layers.layers == [1, 2]
    assert choose_heads(layers, scores, 2).exact_heads == [(2, 0), (1, 1)]


def test_a_choice_is_among_the_layers_that_the_family_converts(tiny_config):
    """Layers 0, 2 and 4 of this Gemma are local: they stay softmax, whatever they are worth."""
    kinds = ["sliding_attention", "full_attention"] * 3
    config = tiny_config("gemma3_text", num_hidden_layers=6, layer_types=kinds)
    scores = made([[9.0], [1.0], [8.0], [3.0], [7.0], [2.0]])
    groups = families.get("gemma3_text").heads(None, config)[1]
    scores = replace(scores, kv_heads=groups)
    spec = {"layers": {"keep": 0.34, "by": "recall"}, "exact_heads": {"keep": 1}, "mixer": {"window": scores.window}}
    chosen = resolve_heads(Recipe.parse({"name": "r", **spec}, "r"), scores, config, torch.float32)
    assert chosen.layers == [1, 5] and chosen.exact_heads == [(5, 0)]
    spec.pop("layers")
    chosen = resolve_heads(Recipe.parse({"name": "r", **spec}, "r"), scores, config, torch.float32)
    assert chosen.layers == "all" and chosen.exact_heads == [(3, 0)]


def test_windows_go_where_they_matter():
    """Layer 0 needs nothing, layer 1 a little more, layer 2 the most; layer 3 says that 32 is worse than 16: noise."""
    scores = {16: [0.1, 1.0, 4.0, 0.5], 32: [0.1, 0.2, 3.0, 0.6], 64: [0.1, 0.2, 0.0, 0.4]}
    assert choose_windows(scores, 64) == [16, 16, 16, 16]
    assert choose_windows(scores, 100) == [16, 32, 32, 16]  # 64 for layer 2 would be 48 more than there is
    assert choose_windows(scores, 127) == [16, 16, 64, 16]
    assert choose_windows(scores, 128) == [16, 32, 64, 16]
    assert choose_windows(scores, 144) == [16, 32, 64, 32]  # what is left buys no gain: to the larger loss first
    assert choose_windows(scores, 160) == [32, 32, 64, 32]
    assert choose_windows(scores, 10_000) == [64, 64, 64, 64]
    assert choose_windows(scores, 48, [0, 1]) == [16, 32, 16, 16]


def test_a_budget_is_kept_and_more_heads_leave_shorter_windows(tiny_config):
    config = tiny_config("llama", num_hidden_layers=3, max_position_embeddings=8192)
    sizes = {"cache": 0.1, "among": [16, 64, 256, 1024]}
    spec = {"mixer": {"window": {"size": sizes, "sinks": 4}, "combine": "window_only"}}
    scores = replace(made([[0.0, 1.0]] * 3), window={"size": 16, "sinks": 4})
    scores = replace(scores, losses={str(n): [1 / n, 3 / n, 2 / n] for n in sizes["among"]})

    def chosen(heads: object) -> tuple[list[int], float]:
        recipe = Recipe.parse({"name": "r", **spec, "exact_heads": heads}, "r")
        assert recipe.probed
        resolved = resolve_heads(recipe, scores, config, torch.bfloat16)
        made_plan = make_plan(resolved, config, dtype=torch.bfloat16)
        assert [layer.window for layer in made_plan.layers] == resolved.mixer.window.size
        return resolved.mixer.window.size, made_plan.cache_share

    uniform = make_plan(Recipe.parse({"name": "r", **spec}, "r"), config, dtype=torch.bfloat16)
    assert uniform.recipe.probed and uniform.cache_share == pytest.approx(0.1, abs=2e-3)
    long, share = chosen([])
    assert 0.06 < share <= 0.1 and long[1] == max(long) > min(long)
    with pytest.raises(LinearizeError, match=r"windows of 16 tokens .* has 16\.9% already"):
        chosen({"keep": 1})
    sizes["cache"] = 0.2
    short, share = chosen({"keep": 1})
    assert share <= 0.2 and sum(short) < sum(chosen([])[0])
    sizes["among"] = [16, 64]
    with pytest.raises(LinearizeError, match="scored layers under windows of 16, 64"):
        chosen([])


def test_a_layer_on_a_window_loses_divergence_and_recall(planted):
    """Layer 1 looks back for the secret token: that loss counts beside prose, and where answers gain, nothing does."""
    samples = [(hidden({3: 41}), True), (hidden({5: 44}), False)]
    _, units = score_units(planted, samples, WINDOW)
    whole = [unit for unit in units if unit.head is None]
    assert whole[1].recall > 1
    lost = [unit.kl + max(0.0, unit.recall) for unit in whole]
    assert score_layers(planted, samples, WINDOW) == pytest.approx(lost, rel=1e-4, abs=1e-6)
    assert [unit.lost for unit in whole] == lost
    assert replace(whole[1], recall=-3.0).lost == whole[1].kl
    with pytest.raises(LinearizeError, match="divergence on prose"):
        score_layers(planted, samples[1:], WINDOW)


def test_halo_is_recall_over_language():
    assert halo_scores([0.5, 0.1, 0.4], [0.9, 0.7, 0.8]) == pytest.approx([0.0, 2.0, 1.0])
    assert halo_scores([0.5, 0.1], [0.6, 0.9]) == pytest.approx([0.0, 50.0])  # recall lost, no language: the cap
    assert halo_scores([0.9, 0.1], [0.9, 0.899]) == [0.0, 50.0]


def test_scores_survive_the_file(tmp_path):
    scores = made([[0.1, 5.0], [0.0, 0.3]])
    scores.write(tmp_path / "probe.json")
    assert ProbeScores.read(tmp_path / "probe.json") == scores
    with pytest.raises(LinearizeError, match="cannot be read"):
        ProbeScores.read(tmp_path / "none.json")
    before = (tmp_path / "probe.json").read_text().replace('"losses"', '"windows"')  # of divergence alone
    for text in ("[]", before):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(LinearizeError, match=r"other\.json is no probe\.json"):
            ProbeScores.read(tmp_path / "other.json")


def test_lengths_follow_the_window_and_the_rows():
    recipe = Recipe.from_yaml("untrained")
    assert probe_lengths(recipe) == [256, 512, 1024]
    assert probe_lengths(recipe.with_overrides(["mixer.window.size=256"])) == [512, 1024]
    assert probe_lengths(recipe.with_quick()) == [256, 512]
    assert probe_lengths(recipe.with_overrides(["probe.lengths=[300]"])) == [300]


def test_samples_that_the_window_covers_are_refused(random_teacher, byte_tokenizer):
    recipe = Recipe.from_yaml("untrained", ["probe.lengths=[190]"])
    with pytest.raises(LinearizeError, match=r"inside the window of 128.*probe\.lengths=\[320\]"):
        run_probe(random_teacher(), byte_tokenizer, recipe)


@pytest.fixture
def teacher(make_teacher) -> str:
    return str(make_teacher(max_position_embeddings=1024, num_hidden_layers=3))


SMALL = ["data.length=64", "data.held_out=2", "probe.lengths=[640]", "probe.samples=1", "mixer.window.size=24"]


def test_untrained_with_probed_heads_from_end_to_end(teacher, tmp_path, monkeypatch):
    events = []
    settings = {"overrides": [*SMALL, "exact_heads.cache=null", "exact_heads.keep=2"]}
    out = linearize(teacher, "untrained", tmp_path / "out", watch=events.append, **settings).output
    scores = ProbeScores.read(out / "probe.json")
    chosen = scores.rank_heads("recall")[:2]
    lock = yaml.safe_load((out / "recipe.lock.yaml").read_text())
    assert [tuple(pair) for pair in lock["chosen"]["exact_heads"]] == chosen
    assert lock["settings"]["recipe"]["exact_heads"]["keep"] == 2
    assert [event["heads"] for event in events if event["event"] == "probed"] == [chosen]
    assert (out / "probe.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((out / "results.json").read_text())
    assert [row["name"] for row in results["rows"]] == ["teacher", "after surgery"]
    resolved = Recipe.parse(yaml.safe_load(results["recipe_yaml"]), "lock")
    assert resolved.exact_heads == chosen
    model = load(out)
    wanted: dict[str, list[int]] = {}
    for layer, head in sorted(chosen):
        wanted.setdefault(str(layer), []).append(head)
    assert model.config.linearize["exact_heads"] == wanted
    with torch.no_grad():
        cached = model(torch.arange(40)[None], use_cache=True).past_key_values
    assert cached.nbytes() < results["cache"][0]["student_bytes"]
    assert list(generate_text(out, "abc", max_new_tokens=3))
    judged = evaluate_folder(out, against=teacher, recall="none", samples=1)["models"]
    assert [model["name"] for model in judged][:2] == ["teacher", "out"]
    assert judged[1]["text"]["held-out"]["kl"] > 0
    assert "untrained" in (out / "README.md").read_text() and "<table" in (out / "report.html").read_text()
    monkeypatch.setattr(api, "run_probe", None)
    assert linearize(teacher, "untrained", tmp_path / "out", **settings).finished_before


def decoded_as_read(model):
    """Check that a text decoded token by token has the logits of one that is read; return those of its last token."""
    with torch.no_grad():
        ids = torch.arange(80)[None] % 60
        full = model(ids).logits[:, -1]
        cache = model(ids[:, :70], use_cache=True).past_key_values
        for place in range(70, 80):
            stepped = model(ids[:, place : place + 1], past_key_values=cache, use_cache=True).logits[:, -1]
    torch.testing.assert_close(stepped, full, rtol=0, atol=1e-4)
    return full


def test_windows_by_layer_from_end_to_end(teacher, tmp_path):
    events = []
    window = "mixer.window.size={cache: 40%, among: [24, 64, 256]}"
    settings = {"overrides": [*SMALL[:-1], window, "exact_heads=[[1, 0]]", "probe.tasks=[multikey_niah]"]}
    out = linearize(teacher, "untrained", tmp_path / "out", watch=events.append, **settings).output
    (sizes,) = [event["windows"] for event in events if event["event"] == "probed"]
    lock = yaml.safe_load((out / "recipe.lock.yaml").read_text())
    assert lock["chosen"]["windows"] == sizes and set(sizes) <= {24, 64, 256}
    model = load(out)
    found = [layer.self_attn.mixer.window for layer in model.model.layers]
    assert found == sizes and model.config.linearize["mixer"]["window"]["size"] == sizes
    decoded_as_read(model)


def test_heads_chosen_together_from_end_to_end(teacher, tmp_path, monkeypatch):
    """Those that the elimination returns are kept, not those that are worst to lose alone."""
    ranked = probing.rank_together
    tried = []

    def reversed_order(model, samples, window, heads, layers):
        tried.append((list(heads), list(layers), {len(sample.prompt_ids) > 500 for sample, _ in samples}))
        return tuple(reversed(ranked(model, samples, window, heads, layers)))

    monkeypatch.setattr(probing, "rank_together", reversed_order)
    settings = [*SMALL, "probe.lengths=[400, 1000]", "exact_heads={keep: 1, by: joint}", "layers=[1, 2]"]
    out = linearize(teacher, "untrained", tmp_path / "out", overrides=settings).output
    scores = ProbeScores.read(out / "probe.json")
    inside = [pair for pair in scores.rank_heads("recall") if pair[0] != 0]
    assert tried == [(inside[:2], [1, 2], {True})]  # two for the one that is kept, on the longest samples
    assert set(scores.joint) == set(inside[:2])
    assert yaml.safe_load((out / "recipe.lock.yaml").read_text())["chosen"]["exact_heads"] == [list(scores.joint[0])]
    recipe = Recipe.from_yaml("untrained", settings)
    with pytest.raises(LinearizeError, match="one at a time, and the recipe chooses them by `joint`"):
        replace(scores, joint=()).check(AutoConfig.from_pretrained(teacher), recipe, "it")


def test_layers_that_stay_softmax_keep_their_heads_while_others_are_given_up(twins):
    """No layer that is not converted is ever put on the window."""
    samples = [(sample, True) for sample in SAMPLES]
    seen = []
    original = probing._Branches.student

    def watch(self, model, exact):
        seen.append(set(exact))
        return original(self, model, exact)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probing._Branches, "student", watch)
        rank_together(twins, samples, WINDOW, [(0, 0), (0, 1)], [0])
    assert seen and all(layers == {0} for layers in seen)


MEMORY = ["mixer.combine=learned", "mixer.memory=additive", "mixer.feature_map=softmax", "mixer.normalize=true"]


def test_a_memory_where_the_probe_finds_recall(teacher, tmp_path):
    """One layer has a memory, the other two have the window alone; it trains, decodes, and is silenced as any other."""
    stages = "stages=[{stage: transfer, tokens: 128, batch: 1}, {stage: finetune, tokens: 128, batch: 1}]"
    choice = "mixer.memory_layers={keep: 0.3, by: recall}"
    settings = {"overrides": [*SMALL, *MEMORY, "exact_heads=[]", choice, stages]}
    assert not any(layer.memory for layer in plan(teacher, "untrained", **settings).layers)  # not chosen yet
    out = linearize(teacher, "untrained", tmp_path / "out", **settings).output
    (chosen,) = ProbeScores.read(out / "probe.json").rank_layers("recall")[:1]
    assert yaml.safe_load((out / "recipe.lock.yaml").read_text())["chosen"]["memory_layers"] == [chosen]
    model = load(out)
    mixers = [layer.self_attn.mixer for layer in model.model.layers]
    assert [mixer.memory is not None for mixer in mixers] == [layer == chosen for layer in range(3)]
    assert applicable(model) == ["memory zeroed", "window only", "memory only", "no mixer"]
    full = decoded_as_read(model)
    with memory_silenced(model):
        assert not torch.allclose(decoded_as_read(model), full, atol=1e-4)


def test_memories_go_where_heads_are_left_and_the_budget_holds(tiny_config):
    """Heads and memories rank by the same recall; layers of one KV head that is exact have no use for a memory."""
    window = {"size": 16, "sinks": 4}
    mixer = {"window": window, "memory": "additive", "memory_layers": {"keep": 0.2}}
    for groups, heads in ((1, {"keep": 2}), (2, {"cache": 0.5}), (2, {"cache": 0.6})):
        config = tiny_config("llama", num_hidden_layers=10, num_key_value_heads=groups, max_position_embeddings=8192)
        scores = replace(made([[float(10 - layer)] * groups for layer in range(10)]), window=window)
        recipe = Recipe.parse({"name": "r", "mixer": mixer, "exact_heads": heads}, "r")
        chosen = resolve_heads(recipe, scores, config, torch.bfloat16)
        built = make_plan(chosen, config, dtype=torch.bfloat16)
        assert [bool(layer.memory) for layer in built.layers].count(True) == 2
        assert built.cache_share <= heads.get("cache", 1)
        kept = [layer for layer, _ in chosen.exact_heads]
        assert chosen.mixer.memory_layers == [layer for layer in range(10) if kept.count(layer) < groups][:2]
        assert kept.count(0) == groups  # the best layer is exact altogether


def test_what_memory_layers_cannot_mean(teacher, random_teacher):
    def asked(*more: str):
        settings = ["exact_heads=[]", *SMALL, *MEMORY, *more]
        return plan(teacher, "untrained", overrides=settings)

    one, two, every = (asked(f"mixer.memory_layers={layers}").cache_share for layers in ("[1]", "[0, 1]", "all"))
    assert every - two == pytest.approx(two - one)
    shares = {keep: asked(f"mixer.memory_layers={{keep: {keep}}}").cache_share for keep in (0.01, 0.3, 0.6, 0.99)}
    assert shares == {0.01: one, 0.3: one, 0.6: two, 0.99: every}
    with pytest.raises(LinearizeError, match=r"names layer 0, which is not converted"):
        asked("mixer.memory_layers=[0]", "layers=[1, 2]")
    recipe = Recipe.from_yaml("untrained", [*SMALL, *MEMORY, "exact_heads=[[0, 0], [0, 1]]", "mixer.memory_layers=[0]"])
    with pytest.raises(LinearizeError, match="layer 0, whose heads are all exact"):
        convert(random_teacher(), recipe.mixer.model_dump(), exact_heads=recipe.exact_heads)
    with pytest.raises(LinearizeError, match="does not use both a window and a memory"):
        asked("mixer.memory_layers=[0]", "mixer.combine=window_only")


def test_an_interrupted_run_does_not_probe_again(teacher, tmp_path, monkeypatch):
    settings = {"overrides": [*SMALL, "exact_heads={keep: 1, by: kl}"]}

    def stop(event):
        if event["event"] == "probed":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        linearize(teacher, "untrained", tmp_path / "out", watch=stop, **settings)
    monkeypatch.setattr(api, "run_probe", None)
    out = linearize(teacher, "untrained", tmp_path / "out", **settings).output
    assert len(yaml.safe_load((out / "recipe.lock.yaml").read_text())["chosen"]["exact_heads"]) == 1


def test_the_probe_alone_serves_plans_and_runs(teacher, tmp_path, monkeypatch):
    scores, folder = api.probe(teacher, "untrained", tmp_path / "probe", overrides=SMALL)
    assert len(scores.heads()) == 6 and len(scores.units) == 9
    monkeypatch.setattr(api, "run_probe", None)
    assert api.probe(teacher, "untrained", tmp_path / "probe", overrides=SMALL)[0] == scores
    with pytest.raises(LinearizeError, match="was made from"):
        api.probe(teacher, "untrained", tmp_path / "probe", overrides=SMALL, seed=1)
    given = [*SMALL, "exact_heads={keep: 2}", f"probe.file={folder / 'probe.json'}"]
    planned = plan(teacher, "untrained", overrides=given)
    assert sorted(planned.recipe.exact_heads) == sorted(scores.rank_heads("recall")[:2])
    out = linearize(teacher, "untrained", tmp_path / "out", overrides=given).output
    assert ProbeScores.read(out / "probe.json") == scores
    for wrong, words in (
        (["mixer.window.size=25"], "under the window"),
        (["exact_heads={keep: 9}"], "have 6 KV heads"),
    ):
        with pytest.raises(LinearizeError, match=words):
            plan(teacher, "untrained", overrides=[*given, *wrong])
    with pytest.raises(LinearizeError, match="no effect"):
        plan(teacher, "untrained", overrides=[*SMALL, "exact_heads=[]", f"probe.file={folder / 'probe.json'}"])
    renamed = replace(scores, layers=4)
    renamed.write(tmp_path / "other.json")
    with pytest.raises(LinearizeError, match="with 4 layers"):
        plan(teacher, "untrained", overrides=[*given[:-1], f"probe.file={tmp_path / 'other.json'}"])


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_an_output_that_cannot_be_written_is_found_before_anything_loads(place, teacher, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(api, "load_teacher", None)
    with pytest.raises(LinearizeError, match=r"cannot be written: .*--output"):
        api.probe(teacher, "untrained", tmp_path / place, overrides=SMALL)


def test_scores_are_kept_before_anything_is_chosen_by_them(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(api, "resolve_heads", None)
    with pytest.raises(TypeError):
        api.probe(teacher, "untrained", tmp_path / "new" / "probe", overrides=SMALL)
    assert len(ProbeScores.read(tmp_path / "new" / "probe" / "probe.json").heads()) == 6


def test_a_budget_that_buys_no_head_needs_no_probe(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(api, "run_probe", None)
    out = linearize(teacher, "untrained", tmp_path / "out", overrides=[*SMALL, "exact_heads.cache=2%"]).output
    assert load(out).config.linearize["exact_heads"] == {} and not (out / "probe.json").exists()


def test_layers_by_the_probe(teacher, tmp_path):
    overrides = [*SMALL, "exact_heads=[]", "layers={keep: 0.34, by: transfer}"]
    out = linearize(teacher, "untrained", tmp_path / "out", overrides=overrides).output
    best = ProbeScores.read(out / "probe.json").rank_layers("transfer")[0]
    assert load(out).config.linearize["layers"] == [layer for layer in range(3) if layer != best]


def test_the_command(teacher, tmp_path, capsys):
    from linearize.cli import main

    with pytest.raises(SystemExit, match="0"):
        main(["probe", "--model", teacher, "--output", str(tmp_path / "p"), *SMALL])
    text = capsys.readouterr().out
    assert "worst to lose first" in text and "probe.file=" in text
    assert {path.name for path in (tmp_path / "p").iterdir()} == {"probe.json", "probe.png"}
    scores = ProbeScores.read(tmp_path / "p" / "probe.json")
    assert asdict(scores)["samples"] == {
        "tasks": ["passkey", "multikey_niah"],
        "lengths": [640],
        "samples": 1,
        "seed": 0,
    }
    first = scores.rank_heads("recall")[0]
    assert f"({first[0]},{first[1]})" in text


def test_a_model_of_one_chunk_of_candidates_or_many(random_teacher, monkeypatch):
    model = random_teacher()
    rows = [(SAMPLES[0], True)]
    whole = score_units(model, rows, WINDOW)
    monkeypatch.setattr(probing, "_chunks", lambda units, _: ([unit] for unit in units))
    apart = score_units(model, rows, WINDOW)
    for one, other in zip(whole[1], apart[1], strict=True):
        assert (one.layer, one.head) == (other.layer, other.head)
        assert (one.recall, one.kl, one.transfer) == pytest.approx((other.recall, other.kl, other.transfer), abs=1e-4)
    assert whole[0] == pytest.approx(apart[0])
