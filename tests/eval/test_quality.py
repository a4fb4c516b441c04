import copy
import itertools

import peft
import pytest
import torch
from transformers import CohereConfig, CohereForCausalLM, LlamaConfig, LlamaForCausalLM

from linearize.data import pack
from linearize.data.formatting import Encoded
from linearize.errors import LinearizeError
from linearize.eval import TeacherReference, evaluate
from linearize.eval import logits as logits_module

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
}


def llama(seed=0, **changes):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**(SIZES | changes)))


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(0)
    documents = []
    for size in (150, 7, 90, 33, 200, 64, 130):
        ids = torch.randint(0, 97, (size,), generator=generator).tolist()
        labels = [-100] * 5 + ids[5:]
        documents.append(Encoded(ids, labels))
    return pack(documents, length=128)


@torch.no_grad()
def straightforward(student, teacher, rows):
    """Document by document in fp64, without packing: sums of loss, KL and agreement, and their number."""
    student, teacher = copy.deepcopy(student).double(), copy.deepcopy(teacher).double()
    total = torch.zeros(4, dtype=torch.float64)
    for row in range(len(rows)):
        starts = [*(rows.position_ids[row] == 0).nonzero()[:, 0].tolist(), rows.length]
        for start, stop in itertools.pairwise(starts):
            ids = rows.input_ids[row, start:stop].long()[None]
            log_q = student(ids).logits[0].log_softmax(-1)
            log_p = teacher(ids).logits[0].log_softmax(-1)
            for place in range(1, stop - start):
                label = int(rows.labels[row, start + place])
                if label != -100:
                    q, p = log_q[place - 1], log_p[place - 1]
                    kl = (p.exp() * (p - q)).sum()
                    total += torch.stack([-q[label], kl, (p.argmax() == q.argmax()).double(), torch.ones(()).double()])
    return total


@pytest.mark.parametrize("chunk_elements", [97 * 3, 2**23])
def test_quality_is_the_straightforward_one(rows, monkeypatch, chunk_elements):
    monkeypatch.setattr(logits_module, "CHUNK_ELEMENTS", chunk_elements)
    teacher, student = llama(0), llama(1)
    quality = evaluate(student, rows, TeacherReference(teacher, rows))
    loss, kl, agree, tokens = straightforward(student, teacher, rows).tolist()
    assert quality.tokens == tokens == (rows.labels != -100).sum()
    assert quality.loss == pytest.approx(loss / tokens, rel=1e-6)
    assert quality.perplexity == pytest.approx(torch.tensor(loss / tokens).exp().item(), rel=1e-5)
    assert quality.kl == pytest.approx(kl / tokens, rel=1e-5)
    assert quality.top1_agreement == agree / tokens


def test_the_teacher_agrees_with_itself(rows):
    teacher = llama()
    reference = TeacherReference(teacher, rows)
    again = evaluate(teacher, rows, reference)
    assert reference.quality.kl == 0
    assert reference.quality.top1_agreement == 1
    assert again.kl == pytest.approx(0, abs=1e-6)
    assert again.loss == pytest.approx(reference.quality.loss, rel=1e-6)


def test_the_reference_keeps_the_teacher_of_before(rows):
    teacher = llama()
    reference = TeacherReference(teacher, rows)
    before = evaluate(llama(1), rows, reference).kl
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(1.5)
    assert evaluate(llama(1), rows, reference).kl == before
    assert evaluate(teacher, rows, reference).kl > 0.01


def test_the_reference_is_hidden_states_not_logits(rows):
    reference = TeacherReference(llama(), rows)
    assert {states.shape[1] for states in reference.states} == {SIZES["hidden_size"]}


def test_a_model_that_scales_its_logits_is_measured_exactly(rows):
    def cohere(seed):
        torch.manual_seed(seed)
        return CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.25))

    teacher, student = cohere(0), cohere(1)
    reference = TeacherReference(teacher, rows)
    assert reference.head is None
    quality = evaluate(student, rows, reference)
    loss, kl, _, tokens = straightforward(student, teacher, rows).tolist()
    assert quality.loss == pytest.approx(loss / tokens, rel=1e-5)
    assert quality.kl == pytest.approx(kl / tokens, rel=1e-5)


def test_positions_cover_all_tokens_once(rows):
    quality = evaluate(llama(1), rows, TeacherReference(llama(), rows))
    assert [(part.start, part.stop) for part in quality.by_position] == [(1, 64), (64, 128)]
    assert sum(part.tokens for part in quality.by_position) == quality.tokens
    mean = sum(part.tokens * part.kl for part in quality.by_position) / quality.tokens
    assert mean == pytest.approx(quality.kl)
    long = ((rows.labels != -100) & (rows.position_ids >= 64)).sum()
    assert quality.by_position[1].tokens == long


def test_a_peft_model_is_measured_with_its_adapters(rows):
    reference = TeacherReference(llama(), rows)
    adapted = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["v_proj"], init_lora_weights=False))
    through = evaluate(adapted, rows, reference)
    merged = evaluate(adapted.merge_and_unload(), rows, reference)
    assert through.kl > 1e-3
    assert through.kl == pytest.approx(merged.kl, rel=1e-4)


def test_without_a_teacher_there_is_no_divergence(rows):
    quality = evaluate(llama(), rows)
    assert quality.kl is None
    assert "kl" not in quality.row("student")
    assert quality.row("student")["perplexity"] == quality.perplexity


def test_evaluation_leaves_the_model_as_it_was(rows):
    model = llama().train()
    evaluate(model, rows)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_rows_beyond_the_context_warn_and_are_marked(rows):
    model = llama(max_position_embeddings=64)
    with pytest.warns(UserWarning, match="beyond the context of 64"):
        quality = evaluate(model, rows)
    assert "beyond the context of 64" in quality.row("student")["note"]


def test_other_rows_than_the_references_are_refused(rows):
    reference = TeacherReference(llama(), rows)
    with pytest.raises(LinearizeError, match="other rows"):
        evaluate(llama(), rows[1:], reference)


def test_a_ruined_model_has_infinite_perplexity_not_an_overflow(rows):
    model = llama()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e5)
    assert evaluate(model, rows).perplexity == float("inf")
