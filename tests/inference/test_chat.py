"""Chat templates: those that take strings, those that take parts, and those that fail."""

import pytest
import tiny

from eigenzoo.zoo.inference.chat import render
from eigenzoo.zoo.inference.data import encode_prompt

CHAT = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "a mat"}]
PARTS = """
{%- for m in messages %}<{{ m.role }}>
{%- for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}
{%- endfor %}"""
STRICT = """
{%- for m in messages %}{% if m.content is string %}{{ raise_exception('parts only') }}{% endif %}
{%- for part in m.content %}{{ part['text'] }};{% endfor %}{% endfor %}"""


def tokenizer(template):
    words = tiny.tokenizer()
    words.chat_template = template
    return words


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (tiny.CHAT, "<user>the cat<assistant>a mat<assistant>"),
        (PARTS, "<user>the cat<assistant>a mat"),  # would silently leave strings out
        (STRICT, "the cat;a mat;"),
    ],
)
def test_contents_are_given_in_the_form_that_the_template_takes(template, text):
    assert render(tokenizer(template), CHAT) == text
    parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in CHAT]
    assert render(tokenizer(template), parts) == text


def test_a_template_may_shorten_earlier_answers():
    template = "{% for m in messages if m.role == 'user' %}{{ m.content | trim }}{% endfor %}"
    assert render(tokenizer(template), [{"role": "user", "content": " the cat "}, *CHAT[1:]]) == (
        "the cat"
    )


BROKEN = {
    "{{ raise_exception('roles must\\nalternate') }}": "roles must alternate",
    "{% for m in messages %}{{ m.content }}": "Unexpected end of template",
    "{{ messages[0].nothing.more }}": "has no attribute 'nothing'",
    "{{ messages[0].content + 1 }}": "can only concatenate str",
    "{{ 1 // 0 }}": "by zero",
    "{{ ''.__class__.__mro__ }}": "unsafe",
    "{{ range(10000000000) }}": "Range too big",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}": "recursion",
    "hello": "its text does not hold what the user says",
}


@pytest.mark.parametrize("template", BROKEN)
def test_a_template_that_fails_is_one_line_of_error(template):
    with pytest.raises(ValueError, match="the chat template of the tokenizer fails: ") as error:
        encode_prompt(tokenizer(template), "the cat")
    assert BROKEN[template] in str(error.value)
    assert "\n" not in str(error.value)
    assert str(error.value).endswith("--no-chat does not use it")
    assert encode_prompt(tokenizer(template), "the cat", chat=False)


def test_a_command_says_that_the_template_fails(run, tmp_path):
    tiny.save(tmp_path / "m", chat=True)
    (tmp_path / "m/chat_template.jinja").write_text("{{ raise_exception('no users') }}")
    code, text, said = run("generate", tmp_path / "m", "-p", "the cat", "--no-compile")
    assert (code, text) == (2, "")
    assert said == (
        "error: the chat template of the tokenizer fails: no users; --no-chat does not use it\n"
    )
