"""Chat templates: what they render, what they may not do, and where they are found."""

import json
import re
import time

import pytest

from m2jax.text import chat_template, load_tokenizer, render_chat, special_strings
from tests.small_tokenizers import BUNDLED

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi {{ 6 * 7 }}"},
    {"role": "assistant", "content": "Hé."},
    {"role": "user", "content": "Bye <s>"},
]


def render(template, messages=CONVERSATION, **options):
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    return render_chat(template, messages, **tokens | options)


def test_the_bundled_template_gives_a_prompt_with_one_bos():
    template, named = chat_template(BUNDLED), special_strings(BUNDLED)
    assert (named["bos_token"], named["eos_token"]) == ("<s>", "</s>")
    text = render(template, CONVERSATION[:3])
    assert text == (
        "<s>Be brief.\n<|user|>\nHi {{ 6 * 7 }}\n<|assistant|>\nHé.</s><|assistant|>\n"
    )
    tokenizer = load_tokenizer(BUNDLED, vocab_size=8192, bos_token_ids=(1,))
    ids = tokenizer.encode(text, parse_special=True)
    assert [i for i in ids if i < 5] == [1, 3, 4, 2, 4]
    assert ids[0] == 1


def test_the_generation_prompt_can_be_left_out():
    template = "{{ messages[0].content }}{% if add_generation_prompt %}|{% endif %}"
    assert render(template) == "Be brief.|"
    assert render(template, add_generation_prompt=False) == "Be brief."


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{% if true %}\nA\n    {% endif %}\nB", "A\nB"),
        ("{% for m in messages %}{{ loop.index }}{% break %}{% endfor %}", "1"),
        ("{% generation %}{{ eos_token }}{% endgeneration %}!", "</s>!"),
        ("{{ messages[2] | tojson }}", '{"role": "assistant", "content": "Hé."}'),
        ("{{ [1] | tojson(indent=2) }}", "[\n  1\n]"),
        ("{{ '<&>' }}{{ tools is none }}{{ nothing is defined }}", "<&>TrueFalse"),
    ],
)
def test_templates_mean_what_they_mean_in_transformers(template, text):
    assert render(template) == text


def test_strftime_now_gives_the_date():
    dates = [time.strftime("%d %b %Y")]
    text = render("{{ strftime_now('%d %b %Y') }}")
    assert text in [*dates, time.strftime("%d %b %Y")]


def test_a_template_that_refuses_the_messages_is_quoted_in_one_line():
    with pytest.raises(ValueError, match=r"^chat template: No system here\.$"):
        render("{{ raise_exception('No system\n here.') }}")


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for x in messages %}", "line 1: Unexpected end of template"),
        ("\n\n{{ 1 + }}", "line 3: "),
        ("{{ nothing.at_all }}", "'nothing' is undefined"),
        ("{{ messages[0].content + 1 }}", "can only concatenate str"),
        ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__'"),
        ("{{ messages.append(1) }}", "attribute 'append' of 'list' object is unsafe"),
        ("{% for i in range(10**6) %}{% endfor %}", "Range too big"),
        ("{% include 'x' %}", "no loader"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ raise_exception('') }}", "TemplateError"),
    ],
)
def test_a_wrong_or_hostile_template_is_refused_in_one_line(template, said):
    wanted = f"^chat template: .*{re.escape(said)}"
    with pytest.raises(ValueError, match=wanted) as caught:
        render(template)
    assert "\n" not in str(caught.value)


LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}"
ENDLESS = {
    "loops that show nothing": LOOP + "{% endfor %}{% endfor %}",
    "loops that show little": LOOP + "{{ '' }}{% endfor %}{% endfor %}",
    "one long operation": "{{ 10 ** (10 ** 9) }}",
}


@pytest.mark.parametrize("name", ENDLESS)
def test_an_endless_template_is_stopped_by_the_time_limit(name):
    begin_s = time.monotonic()
    with pytest.raises(ValueError, match=r"still running after 0\.3 s of processor"):
        render(ENDLESS[name], limit_s=0.3)
    assert time.monotonic() - begin_s < 20


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a' * 10 ** 10 }}",
        "{% set n = namespace(x='a' * 10 ** 8) %}"
        "{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "{{ '%2000000000d' % 1 }}",
    ],
)
def test_a_template_that_fills_the_memory_is_stopped(template):
    with pytest.raises(ValueError, match="needs more than 512 MiB of memory"):
        render(template, limit_s=60)


def test_the_length_of_template_and_text_is_limited():
    with pytest.raises(ValueError, match=r"1,048,577 characters, at most 1,048,576"):
        render("x" * (2**20 + 1))
    assert render("{{ 'x' * 5 }}", limit_chars=5) == "xxxxx"
    with pytest.raises(ValueError, match="gives more than 5 characters"):
        render("{{ 'x' * 5 }}{{ 'x' }}", limit_chars=5)
    assert len(render("{{ messages }}", "é" * 2**20)) == 2**20


def test_messages_that_json_cannot_hold_are_refused():
    nested = []
    for _ in range(10_000):
        nested = [nested]
    for messages in ([{"role": "user", "content": b"x"}], nested):
        with pytest.raises(ValueError, match=r"^messages: not JSON: "):
            render("x", messages)


def test_a_template_file_wins_over_the_config(tmp_path):
    config = tmp_path / "tokenizer_config.json"
    assert chat_template(tmp_path) is None
    config.write_text(json.dumps({"chat_template": "from the config"}))
    assert chat_template(tmp_path) == "from the config"
    (tmp_path / "chat_template.jinja").write_text("from the file")
    assert chat_template(tmp_path) == "from the file"


def test_of_named_templates_the_default_is_taken(tmp_path):
    named = [
        {"name": "tool_use", "template": "T"},
        {"name": "default", "template": "D"},
    ]
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": named}))
    assert chat_template(tmp_path) == "D"
    config.write_text(json.dumps({"chat_template": named[:1]}))
    assert chat_template(tmp_path) is None


NO_TEMPLATES = [7, {"default": "x"}, [{"name": "default", "template": 7}]]


@pytest.mark.parametrize("template", NO_TEMPLATES)
def test_a_template_of_another_form_is_refused(tmp_path, template):
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": template}))
    with pytest.raises(ValueError, match=r"config\.json: chat_template: wanted"):
        chat_template(tmp_path)


def test_a_template_file_over_4_mib_is_not_read(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("x" * (2**22 + 1))
    with pytest.raises(ValueError, match=r"chat_template\.jinja: 4,194,305 bytes"):
        chat_template(tmp_path)
