import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from linearize.eval import format_bytes, kv_cache_bytes, tensor_bytes

CONFIG = LlamaConfig(
    vocab_size=16,
    hidden_size=24,
    intermediate_size=16,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
)


@pytest.mark.parametrize("context", [1, 33])
@pytest.mark.parametrize("batch", [1, 2])
def test_the_formula_is_what_a_cache_holds(context, batch):
    cache = DynamicCache(config=CONFIG)
    LlamaForCausalLM(CONFIG)(torch.zeros(batch, context, dtype=torch.long), past_key_values=cache, use_cache=True)
    expected = kv_cache_bytes(CONFIG, context, torch.float32, batch)
    assert expected == 2 * 3 * 2 * 6 * 4 * context * batch
    assert tensor_bytes(cache) == expected


def test_sliding_layers_keep_their_window():
    config = LlamaConfig(
        **(CONFIG.to_dict() | {"layer_types": ["full_attention", "sliding_attention", "full_attention"]})
    )
    config.sliding_window = 8
    assert kv_cache_bytes(config, 32, torch.bfloat16) == 2 * 2 * 6 * 2 * (32 + 8 + 32)


def test_shared_storage_counts_once():
    tensor = torch.zeros(10)
    assert tensor_bytes([tensor, {"view": tensor[2:]}, (torch.zeros(1),)]) == 44


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1536, "1.50 KiB"), (22.5 * 2**20, "22.5 MiB"), (512 * 2**30, "512 GiB")],
)
def test_bytes_have_three_digits(count, text):
    assert format_bytes(count) == text
