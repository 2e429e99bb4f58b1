"""A conversation becomes the tokens that transformers makes of it, or one line that says why not."""

import json

import pytest

from flora_jax.checkpoints.chat import load_chat
from flora_jax.checkpoints.tokenizer import load_tokenizer
from flora_jax.errors import InputError
from flora_jax.serve.request import Limits, Reader, Request, RequestError
from tests.helpers.byte_tokenizer import (
    CHAT_PIECES,
    CHAT_TEMPLATE,
    END,
    TURN_END,
    save_chat_tokenizer,
)

USER = {"role": "user", "content": " ab é <|im_end|> 12  \n"}
CHATS = [
    [USER],
    [{"role": "system", "content": "be brief"}, USER],
    [USER, {"role": "assistant", "content": "abc"}, {"role": "user", "content": ""}],
]
# What templates of published models use.
TEMPLATES = {
    "plain": CHAT_TEMPLATE,
    "generation": (
        "{% for m in messages %}\n  {% if m.role == 'assistant' %}\n{% generation %}\n{{ m.content }}\n"
        "{% endgeneration %}\n{% endif %}\n{% endfor %}\nend {{ tools is none }} {{ documents }}"
    ),
    "namespace": (
        "{% set ns = namespace(count=0, self='x') %}{% for m in messages %}"
        "{% if m.role == 'system' %}{% continue %}{% endif %}{% set ns.count = ns.count + 1 %}"
        "{{ ns.self }}{{ ns.count }}{{ dict(a=m.content, b=[1]) | tojson }}{% endfor %}"
        "{{ messages | length }}{{ messages | tojson(indent=2) }}{{ unk_token }}"
    ),
    "date": "{{ strftime_now('%Y') | length }}{{ messages[-1]['content'][::-1] }}",
}


@pytest.fixture
def folder(tmp_path):
    save_chat_tokenizer(tmp_path / "m")
    return tmp_path / "m"


def limits_of(folder):
    tokenizer = load_tokenizer(folder, CHAT_PIECES)
    return Limits(500, CHAT_PIECES, tokenizer, load_chat(folder, "my/model"))


def transformers_ids(folder, messages, add_generation_prompt):
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    return tuple(
        tokenizer.apply_chat_template(
            messages, add_generation_prompt=add_generation_prompt, return_dict=False
        )
    )


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("generation", [True, False])
def test_a_conversations_ids_are_those_of_transformers(name, generation, tmp_path):
    save_chat_tokenizer(tmp_path, TEMPLATES[name])
    limits = limits_of(tmp_path)
    for messages in CHATS:
        ids = limits.encode_messages(messages, generation)
        assert ids == transformers_ids(tmp_path, messages, generation)


def test_special_tokens_are_those_of_the_template_and_no_others(folder):
    limits = limits_of(folder)
    ids = limits.encode_messages([{"role": "user", "content": "abc"}])
    assert ids.count(0) == 1  # The tokenizer puts it before every other text.
    assert limits.encode("abc") == (0, 258)
    assert ids[0] == 0
    assert ids.count(259) == 2
    assert ids.count(260) == 1


def test_the_template_is_read_where_transformers_reads_it(folder):
    own = "own {{ messages[0].content }}"
    named = [{"name": "default", "template": own}, {"name": "tool_use", "template": "x"}]
    save_chat_tokenizer(folder, named)
    assert load_chat(folder, "m").template == own
    (folder / "chat_template.jinja").write_text("first {{ eos_token }}")
    chat = load_chat(folder, "m")
    assert chat.render([USER]) == f"first {TURN_END}"
    assert limits_of(folder).encode_messages([USER]) == transformers_ids(folder, [USER], True)
    assert chat.where == str(folder / "chat_template.jinja")
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": END}}))
    assert load_chat(folder, "m").render([USER]) == f"first {END}"
    assert limits_of(folder).encode_messages([USER]) == transformers_ids(folder, [USER], True)


def test_a_line_of_messages_is_a_request_like_any_other(folder):
    limits = limits_of(folder)
    raw = {"messages": CHATS[1], "max_tokens": 3}
    request = Reader(limits).request(raw, 4)
    ids = limits.encode_messages(CHATS[1])
    assert request == Request(ids, request.sampling_params, request_id=4, fold_in=4)
    assert request.sampling_params.max_tokens == 3
    small = Limits(8, CHAT_PIECES, limits.tokenizer, limits.chat)
    with pytest.raises(RequestError, match=r"the prompt has \d+ tokens, the context 8"):
        Reader(small).request(raw)
    assert Reader(small, keep_last=True).request(raw).prompt_token_ids == ids[-5:]


def test_a_model_without_a_template_is_named(folder):
    save_chat_tokenizer(folder, None)
    with pytest.raises(RequestError, match=r"^my/model: has no chat template, expected chat_temp"):
        limits_of(folder).encode_messages([USER])


@pytest.mark.parametrize(
    "template, named",
    [
        ("{% if %}", "tokenizer_config.json: the chat template is no valid Jinja: Expected"),
        (CHAT_TEMPLATE.replace("'user'", "'x'"), "refuses the messages: no role user"),
        ("{{ messages[7].content.upper() }}", "refuses the messages: .* has no element 7"),
        ("{{ messages.append(1) }}", "refuses the messages: "),
        ("{{ raise_exception.__globals__.x }}", "refuses the messages: .*unsafe"),
        ("{% set n = namespace() %}{% set n.__class__ = 1 %}", "no attribute '__class__'"),
        ("{{ namespace(_x=1) }}", "takes no attribute '_x'"),
        ("{{ 1 / 0 }}", "refuses the messages: division by zero"),
    ],
)
def test_a_template_that_fails_says_why(template, named, tmp_path):
    save_chat_tokenizer(tmp_path, template)
    with pytest.raises(RequestError, match=named) as caught:
        limits_of(tmp_path).encode_messages([USER])
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    "text, named",
    [
        ("[", "not JSON"),
        ("[]", "expected a JSON object, found list"),
        ('{"chat_template": 3}', "chat_template is int, expected a string or a list"),
        (
            '{"chat_template": [{"name": "rag", "template": "x"}]}',
            "chat_template is rag, expected a string or a list with 'default'",
        ),
    ],
)
def test_damaged_settings_are_named(text, named, folder):
    (folder / "tokenizer_config.json").write_text(text)
    with pytest.raises(InputError, match=named) as caught:
        load_chat(folder, "m")
    assert str(folder / "tokenizer_config.json") in str(caught.value)
