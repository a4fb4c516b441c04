import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def bytes_only():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: index for index, symbol in enumerate(["</s>", *alphabet, "<s>"])}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return made


@pytest.fixture(scope="session")
def tokenizer():
    """One token a byte, so that a test knows every id; `</s>` ends a sequence."""
    return PreTrainedTokenizerFast(tokenizer_object=bytes_only(), eos_token="</s>")


@pytest.fixture(scope="session")
def bos_tokenizer():
    """The same, with `<s>` before every text."""
    made = bytes_only()
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 257)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


@pytest.fixture
def chat_tokenizer(tokenizer):
    with_template = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>")
    with_template.chat_template = TEMPLATE
    return with_template
