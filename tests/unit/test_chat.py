"""Chat templates: what well-meant ones give, and that hostile ones neither read, call, hang nor grow."""

from __future__ import annotations

import datetime as dt
import json
import time
from pathlib import Path
from typing import Any

import pytest
from jinja2.exceptions import SecurityError

from inferos.errors import ConfigError, ModelError, TemplateError
from inferos.runtime._sandbox import MAX_SOURCE, Budget
from inferos.runtime.chat import ChatTemplate, check_messages, find_template

TALK = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Hello!"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "2 < 3 & 'so'?"},
]
CHATML = """{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""
# The forms that templates of known model families use, in one.
RICH = """{{- bos_token }}
{%- set ns = namespace(system='', last=0, many=false) %}
{%- if messages[0]['role'] == 'system' %}
    {%- set ns.system = messages[0]['content'] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}
{%- macro kind(schema) -%}
    {%- if schema.type is string %}{{ schema.type }}{% else %}{{ schema.type | join(' | ') }}{% endif -%}
{%- endmacro %}
{%- for message in messages[::-1] if message.role == 'user' %}
    {%- if loop.first %}{% set ns.last = loop.revindex0 %}{% endif %}
{%- endfor %}
{{- ns.system ~ '|' ~ date_string ~ '|' ~ ns.last }}
{%- for tool in tools or [] %}
    {{- '\\n' + tool.function.name + '(' }}
    {%- for name, p in tool.function.parameters.properties | dictsort %}
        {{- name }}: {{ kind(p) }}{{ ', ' if not loop.last }}
    {%- endfor -%}
    )
    {{- tool | tojson(indent=2) }}
{%- endfor %}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Roles must alternate') }}
    {%- endif %}
    {%- set content = message.content %}
    {%- if content is not string %}
        {%- set content = content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join('') %}
    {%- endif %}
    {%- if '</think>' in content %}{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}
    {{- '\\n[' ~ message.role | upper ~ '] ' ~ content.strip().replace('so', 'SO') }}
    {%- if loop.previtem is defined and loop.nextitem is not defined %}{{ eos_token }}{% endif %}
{%- endfor %}"""


def noon() -> dt.datetime:
    return dt.datetime(2026, 7, 4, 12)


def render(source: str | None, messages: Any = TALK, **more: Any) -> str:
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    return ChatTemplate(source, tokens, now=noon).render(messages, **more)


def test_chatml_is_what_transformers_gives() -> None:
    assert render(CHATML, TALK[1:2]) == "<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n"


def test_the_forms_of_known_families_work() -> None:
    tool = {
        "function": {
            "name": "add",
            "parameters": {"properties": {"b": {"type": ["int", "null"]}, "a": {"type": "int"}}},
        }
    }
    messages = [*TALK[:3], {"role": "user", "content": [{"type": "text", "text": "and so?"}, {"type": "image"}]}]
    messages[2] = {"role": "assistant", "content": "<think>x</think>\nHi."}
    assert render(RICH, messages, tools=[tool]) == (
        "<s>Be short.|04 Jul 2026|1\nadd(a: int, b: int | null)"
        + json.dumps(tool, indent=2)
        + "\n[USER] Hello!\n[ASSISTANT] Hi.\n[USER] and SO?</s>"
    )


def test_a_template_can_refuse_the_messages() -> None:
    with pytest.raises(TemplateError, match="chat template: Roles must alternate"):
        render(RICH, TALK[1:2] * 2)


def test_json_is_written_as_into_training_data() -> None:
    assert render("{{ messages[0].content | tojson }}", [{"role": "u", "content": "<é> & 'x'"}]) == "\"<é> & 'x'\""


def test_generation_marks_and_loop_controls_work() -> None:
    body = "{% if i == 2 %}{% continue %}{% endif %}{% generation %}{{ i }}{% endgeneration %}"
    source = "{% for i in [1, 2, 3] %}" + body + "{% endfor %}"
    assert render(source) == "13"


def test_a_key_named_like_a_method_is_the_key() -> None:
    assert render("{{ messages[0].copy }}{{ messages[0].pop is defined }}", [{"role": "u", "copy": 7}]) == "7False"


def test_without_a_template_the_plain_one_is_used() -> None:
    assert render(None, TALK[:2]) == "System: Be short.\nUser: Hello!\nAssistant:"
    assert render(None, TALK[:2], add_generation_prompt=False) == "System: Be short.\nUser: Hello!\n"
    assert ChatTemplate().stops == ("\nUser:", "\nSystem:")
    assert ChatTemplate(CHATML).stops == ()


@pytest.mark.parametrize(
    "source",
    [
        "{{ '%999999999d' % 1 }}",
        "{{ '{:>999999999}'.format(1) }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''['__class__'] }}",
        "{{ messages | map(attribute='role') | map(attribute='__class__') | list }}",
        "{{ messages | attr('__class__') }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.func.__globals__ }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ self._TemplateReference__context }}",
        "{{ range.__self__ }}",
        "{{ dict.mro() }}",
        "{{ cycler.__init__ }}",
        "{% for m in messages %}{{ loop._iterator }}{% endfor %}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}{{ ns.__class__ }}",
        "{% macro m() %}{% endmacro %}{{ m._func.__code__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(a=1) }}",
        "{{ messages[0].pop('role') }}",
        "{% include '/etc/passwd' %}",
        "{% import '/etc/passwd' as x %}",
        "{% from '/etc/passwd' import x %}",
        "{% extends '/etc/passwd' %}",
        "{% block a %}{{ self.a() }}{% endblock %}",
        "{% autoescape true %}{% endautoescape %}",
        "{{ open('/etc/passwd') }}",
        "{{ strftime_now('%999999999d') }}",
        "{{ strftime_now(5) }}",
    ],
)
def test_what_a_template_may_not_use_is_refused(source: str) -> None:
    with pytest.raises(TemplateError, match=r"^chat template: "):
        render(source)


LOOP = "{% for i in range(9999) %}"
HOSTILE = [
    "{{ 'a' * 10**10 }}",
    "{{ 'a' * 10000000000 }}",
    "{{ [1] * 10000000000 }}",
    "{{ 10000000000 * (1,) }}",
    "{{ 'a' | center(10000000000) }}",
    "{{ 'a'.ljust(10000000000) }}",
    "{{ 'a'.zfill(10000000000) }}",
    "{{ '\t'.expandtabs(10000000000) }}",
    "{{ (1).to_bytes(10000000000, 'big') }}",
    "{{ 'a' | indent(10000000000, true) }}",
    "{{ [1] | tojson(indent=1000000000) }}",
    "{{ 1.5 | round(1000000000) }}",
    "{{ 10 ** 10 ** 10 }}",
    "{{ lipsum(1000000) }}",
    "{% for i in range(10 ** 18) %}{% endfor %}",
    LOOP * 4 + "{% endfor %}" * 4,
    LOOP + LOOP + "{% endfor %}x{% endfor %}",
    LOOP + "{% for j in range(9999) if false %}{% endfor %}{% endfor %}",
    LOOP + "x" * 60_000 + "{% endfor %}",
    "{% filter upper %}" + LOOP + "x" * 60_000 + "{% endfor %}{% endfilter %}",
    "{% macro m() %}" + "x" * 60_000 + "{% endmacro %}" + LOOP + "{% set x = m() %}{% endfor %}",
    "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
    "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "{% macro m() %}{{ m(varargs, varargs) }}{% endmacro %}{{ m(1) }}",
    "{% macro m() %}{{ caller() }}{{ caller() }}{% endmacro %}{% call m() %}"
    + LOOP
    + LOOP
    + "{% endfor %}{% endfor %}{% endcall %}",
    "{% for x in [1] recursive %}{{ loop([1]) }}{{ loop([1]) }}{% endfor %}",
    "{% set ns = namespace(x='a') %}" + LOOP + "{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x='a') %}" + LOOP + "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{% set ns = namespace(x='aa') %}" + LOOP + "{% set ns.x = ns.x.replace('a', ns.x) %}{% endfor %}",
    "{% set ns = namespace(x='aa') %}" + LOOP + "{% set ns.x = ns.x | replace('a', ns.x) %}{% endfor %}",
    "{% set ns = namespace(x='aa') %}" + LOOP + "{% set ns.x = ns.x.join(ns.x) %}{% endfor %}",
    "{% set ns = namespace(x='aa') %}" + LOOP + "{% set ns.x = [ns.x, ns.x] | join(ns.x) %}{% endfor %}",
    "{% set ns = namespace(x='{}{}') %}" + LOOP + "{% set ns.x = ns.x.format(ns.x, ns.x) ~ '{}{}' %}{% endfor %}",
    "{% set ns = namespace(x='a') %}"
    + LOOP
    + "{% set x %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = x %}{% endfor %}",
    "{% set ns = namespace(x=[1]) %}" + LOOP + "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x == ns.x }}",
    "{% set ns = namespace(x={}) %}" + LOOP + "{% set ns.x = dict(a=ns.x, b=ns.x) %}{% endfor %}{{ ns.x | tojson }}",
    "{% set ns = namespace(x=(1,)) %}" + LOOP + "{% set ns.x = (ns.x,) %}{% endfor %}{{ {ns.x: 1} }}",
    "{% set ns = namespace(x=[1]) %}" + LOOP + "{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x=3) %}" + LOOP + "{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "{% set ns = namespace(x=['a']) %}" + LOOP * 2 + "{% set ns.x = ns.x | map('upper') %}{% endfor %}{% endfor %}",
    "{% set ns = namespace() %}{% set ns.a = ns %}{{ ns }}",
    "{% set ns = namespace(x='a') %}{% for i in range(19) %}{% set ns.x = ns.x + ns.x %}{% endfor %}"
    + LOOP
    + "{{ ns.x.rfind('b' ~ 'a' * 1000) }}{% endfor %}",
    "{{ ('a' * 1000000) | trim('b' * 1000) }}",
    "{{ '(' * 9 }}" + "{{ " + "(" * 30_000 + " }}",
    "{{ " + "+".join(["1"] * 30_000) + " }}",
    "{{ " + "[" * 3000 + "]" * 3000 + " }}",
    "{{ a" + ".b" * 30_000 + " }}",
    "{{a}}" * 13_000,
    "{% if 0 %}" + "{% elif 0 %}" * 4500 + "{% endif %}",
    "{% if 0 %}" * 3000 + "{% endif %}" * 3000,
    "{% set a = 1 %}" * 4000,
    "{% macro m() %}{% endmacro %}" * 2000,
    "{% call m() %}{% endcall %}" * 2000,
    LOOP * 30 + "{% endfor %}" * 30,
    "x" * (MAX_SOURCE + 1),
    "{{ 5 // 0 }}",
    "{{ messages.nothing.more }}",
    "{{ nothing() }}",
    "{% for",
    "{% if x %}",
    "{{ 'unclosed",
    "{% unknown %}",
]


@pytest.mark.parametrize("source", HOSTILE, ids=lambda source: source[:60].replace("\t", " "))
def test_a_hostile_template_ends_soon_with_a_typed_error(source: str) -> None:
    began = time.thread_time()
    with pytest.raises(TemplateError, match=r"^chat template: "):
        render(source)
    # The backstop is 5 s; budgets end each of these well before it. This thread's own time: the machine may be busy.
    assert time.thread_time() - began < 4.5


def test_the_time_limit_holds_even_where_no_other_does() -> None:
    clock = iter(range(100))
    budget = Budget({}, lambda: float(next(clock)))
    for _ in range(5):
        budget.spend(0)
    with pytest.raises(SecurityError, match="longer than 5 s"):
        budget.spend(0)


def test_the_limits_grow_with_the_messages() -> None:
    long = [{"role": "user", "content": "word " * 400_000}]
    assert len(render(CHATML, long)) > 1_999_000


def test_a_long_conversation_is_no_attack() -> None:
    source = """{%- set shown = messages[1:] -%}
    {%- for message in shown -%}
        {%- set left = (messages | length - 1) - loop.index0 + shown | length -%}
        {{ message.role ~ left ~ message.content | trim ~ (messages[0] | tojson) }}
    {%- endfor -%}"""
    talk = [{"role": "user", "content": f"message {i}"} for i in range(3000)]
    assert render(source, talk).count("user") == 2 * 2999


def test_a_failed_rendering_leaves_the_template_usable() -> None:
    template = ChatTemplate("{{ messages[0].content * messages[1].content }}")
    with pytest.raises(TemplateError):
        template.render([{"role": "u", "content": "a"}, {"role": "u", "content": 10**10}])
    assert template.render([{"role": "u", "content": "a"}, {"role": "u", "content": 3}]) == "aaa"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hi", "messages: str, wanted a list"),
        ({"role": "user"}, "messages: dict, wanted a list"),
        ([5], r"messages\[0\]: wanted a mapping with a role"),
        ([{"content": "x"}], r"messages\[0\]: wanted a mapping with a role"),
        ([TALK[0], {"role": "user", "content": object()}], r"messages\[1\]\.content: object is not plain data"),
        ([{"role": "user", 5: 1}], r"messages\[0\]: key 5 is not a string"),
    ],
)
def test_messages_of_another_form_are_refused_by_number(messages: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_messages(messages)


def test_messages_nested_without_end_are_refused() -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(ConfigError, match="nested deeper"):
        check_messages([{"role": "user", "content": endless}])


def test_a_template_file_wins_over_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "config"}))
    assert find_template(tmp_path) == "config"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert find_template(tmp_path) == "file"


def test_of_several_named_templates_the_default_is_taken(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert find_template(tmp_path) == "plain"


def test_a_folder_without_a_template_has_none(tmp_path: Path) -> None:
    assert find_template(tmp_path) is None


def test_a_template_that_is_not_text_is_a_typed_error(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": 5}')
    with pytest.raises(TemplateError, match="int, wanted text"):
        find_template(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ModelError, match="not JSON"):
        find_template(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(TemplateError, match="not UTF-8"):
        find_template(tmp_path)
