import pytest

from linearize.data.documents import choose_format, to_document
from linearize.data.formatting import IGNORE, encode
from linearize.errors import LinearizeError

CHAT = {
    "messages": [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yo"},
        {"role": "user", "content": "why"},
        {"role": "assistant", "content": "so"},
    ]
}
ALPACA = {"instruction": "Add.", "input": "1 2", "output": "3"}


def encoded(row, form, tokenizer, loss="all"):
    return encode(to_document(row, form, "here"), tokenizer, loss)


def trained_text(tokenizer, document):
    return tokenizer.decode([label for label in document.labels if label != IGNORE])


def test_text_is_trained_on_as_it_is(tokenizer):
    document = encoded({"text": "some words"}, "text", tokenizer)
    assert tokenizer.decode(document.ids) == "some words"
    assert document.labels == document.ids


def test_chat_follows_the_template_and_masks_all_but_responses(chat_tokenizer):
    whole = "<user>hi</s><assistant>yo</s><user>why</s><assistant>so</s>"
    everything = encoded(CHAT, "chat", chat_tokenizer)
    responses = encoded(CHAT, "chat", chat_tokenizer, loss="response")
    assert chat_tokenizer.decode(everything.ids) == whole
    assert everything.labels == everything.ids == responses.ids
    assert trained_text(chat_tokenizer, responses) == "yo</s>so</s>"
    assert all(label in (IGNORE, token) for token, label in zip(responses.ids, responses.labels, strict=True))


def test_sharegpt_messages_are_understood(chat_tokenizer):
    row = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]}
    assert chat_tokenizer.decode(encoded(row, "chat", chat_tokenizer).ids) == "<user>hi</s><assistant>yo</s>"


def test_instructions_can_go_through_the_chat_template(chat_tokenizer):
    text = chat_tokenizer.decode(encoded(ALPACA, "chat", chat_tokenizer).ids)
    assert text == "<user>Add.\n\n1 2</s><assistant>3</s>"


@pytest.mark.parametrize("extra", ["1 2", "", None])
def test_alpaca_ends_with_the_end_token_and_masks_the_prompt(tokenizer, extra):
    document = encoded(ALPACA | {"input": extra}, "alpaca", tokenizer, loss="response")
    text = tokenizer.decode(document.ids)
    assert text.endswith("### Response:\n3</s>")
    assert ("### Input:\n1 2" in text) == bool(extra)
    assert ("paired with an input" in text) == bool(extra)
    assert trained_text(tokenizer, document) == "3</s>"


@pytest.mark.parametrize(
    ("row", "form"),
    [(CHAT, "chat"), (ALPACA, "alpaca"), ({"prompt": "a", "completion": "b"}, "alpaca"), ({"text": "a"}, "text")],
)
def test_auto_finds_the_format(row, form):
    assert choose_format(row, "auto", "here") == form


@pytest.mark.parametrize("wanted", ["auto", "text", "chat", "alpaca"])
def test_no_usable_column_names_what_there_is_and_what_is_expected(wanted):
    with pytest.raises(LinearizeError, match=r"'here'.*It has label, score\..*Expected text: one of text"):
        choose_format({"label": 1, "score": 2}, wanted, "here")


@pytest.mark.parametrize("row", [{"text": "  "}, {"text": None}])
def test_empty_rows_are_left_out(row):
    assert to_document(row, "text", "here") is None


def test_chat_without_a_template_says_what_to_set(tokenizer):
    with pytest.raises(LinearizeError, match=r"chat template.*data\.format: alpaca"):
        encoded(CHAT, "chat", tokenizer)


def test_a_template_that_rejects_the_conversation_is_reported(chat_tokenizer):
    chat_tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(LinearizeError, match=r"starts 'hi': roles must alternate"):
        encoded(CHAT, "chat", chat_tokenizer)


def test_a_template_that_rewrites_earlier_turns_is_reported(chat_tokenizer):
    chat_tokenizer.chat_template = "{{ messages | length }}" + chat_tokenizer.chat_template
    with pytest.raises(LinearizeError, match="responses cannot be told apart"):
        encoded(CHAT, "chat", chat_tokenizer)


def test_response_loss_needs_responses(tokenizer):
    with pytest.raises(LinearizeError, match=r"data\.loss: all"):
        encoded({"text": "words"}, "text", tokenizer, loss="response")


def test_a_column_that_holds_no_text_is_reported():
    with pytest.raises(LinearizeError, match="'text' of 'here' holds a int"):
        to_document({"text": 3}, "text", "here")
