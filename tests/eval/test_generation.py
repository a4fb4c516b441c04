import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from linearize.eval import sample

WORDS = ["</s>", *(f"w{index}" for index in range(15))]


def test_the_sample_is_the_greedy_continuation():
    tokens = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="</s>"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="</s>")
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=16,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            eos_token_id=0,
        )
    ).train()
    model.generation_config.do_sample = True
    model.generation_config.repetition_penalty = 9.0
    model.generation_config.no_repeat_ngram_size = 1

    ids = tokenizer("w3 w4", return_tensors="pt").input_ids
    for _ in range(6):
        following = model(ids).logits[0, -1].argmax()
        if following == 0:
            break
        ids = torch.cat([ids, following[None, None]], dim=1)
    expected = tokenizer.decode(ids[0, 2:])

    assert expected
    assert sample(model, tokenizer, "w3 w4", max_new_tokens=6) == expected
    assert model.training
