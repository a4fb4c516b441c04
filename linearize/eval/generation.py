"""Greedy continuations, and an encoder's words behind a mask, for a look at what a model writes."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from linearize.eval.logits import evaluation_mode

# What a checkpoint's own generation settings may say otherwise.
GREEDY: dict[str, Any] = {
    "do_sample": False,
    "temperature": None,
    "top_p": None,
    "top_k": None,
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
}


def sample(model: Any, tokenizer: PreTrainedTokenizerBase, prompt: str, max_new_tokens: int = 64) -> str:
    """Return the model's greedy continuation of a prompt, without the prompt; an encoder's is one word, for a mask.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer.
        prompt: text, taken as it is (no chat template).
        max_new_tokens: where to stop, if the model does not end before.
    """
    encoder = not model.can_generate()
    text = f"{prompt} {tokenizer.mask_token}." if encoder else prompt
    inputs = tokenizer(text, return_tensors="pt").to(next(model.parameters()).device)
    inputs.pop("token_type_ids", None)
    if encoder:
        with evaluation_mode(model):
            best = model(**inputs).logits[inputs["input_ids"] == tokenizer.mask_token_id].argmax(-1)
        return str(tokenizer.decode(best))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with evaluation_mode(model):
        tokens = model.generate(
            **inputs,
            **GREEDY,
            max_new_tokens=max_new_tokens,
            pad_token_id=pad,
        )
    written = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert isinstance(written, str)
    return written
