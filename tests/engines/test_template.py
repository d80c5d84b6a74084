"""Chat templates: what transformers gives them, and the bounds within which they are rendered."""

import threading
from datetime import datetime
from typing import Any

import pytest
from jinja2.exceptions import TemplateError

from engines import template
from engines.template import SIZE, Template

HI = [{"role": "user", "content": "Hi"}]


def rendered(source: str, messages: list[dict[str, Any]] = HI, **tokens: str) -> str:
    return Template(source, tokens).render(messages)


@pytest.mark.parametrize(
    ("source", "wanted"),
    [("{% generation %}{{ messages[0].content }}{% endgeneration %}!", "Hi!"),
     ("{% for m in messages %}{%- generation -%} {{ m.content }} {%- endgeneration -%}{% endfor %}", "Hi"),
     ("{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}", "21"),
     ("{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}{% if i > 3 %}{% break %}{% endif %}{{ i }}"
      "{% endfor %}", "023"),
     ("{{ \"<é'>&日\" | tojson }}", "\"<é'>&日\""),
     ("{{ {'b': 1, 'a': [1, 2]} | tojson(indent=1, separators=(',', ':'), sort_keys=True) }}",
      '{\n "a":[\n  1,\n  2\n ],\n "b":1\n}'),
     ("{{ 'é' | tojson(ensure_ascii=True) }}", '"\\u00e9"'),
     ("{{ tools is none }}{{ documents is none }}{{ add_generation_prompt }}", "TrueTrueTrue"),
     ("{{ bos_token }}{{ eos_token is defined }}", "<s>False"),
     ("{% for m in messages if m.role %}{{ loop.index }}{{ loop.last }}{{ loop.length }}{% endfor %}", "1True1"),
     ("{% for k, v in messages[0] | items %}{{ k }}={{ v }} {% endfor %}", "role=user content=Hi "),
     ("{% for x in missing %}{{ x }}{% else %}none{% endfor %}", "none"),
     ("{{ messages | map(attribute='content') | join(', ') }}{{ 1700000000 | string }}", "Hi1700000000"),
     ("{{ 'a' ~ 1 ~ 'b' + 'c' * 3 }}{{ 2 ** 10 }}{{ '%05d' % 7 }}{{ '{:>4}'.format(7) }}", "a1bccc102400007   7"),
     ("  {% if true %}\n  x\n  {% endif %}\n", "  x\n")],
)  # fmt: skip
def test_what_templates_use(source: str, wanted: str) -> None:
    assert rendered(source, bos_token="<s>") == wanted


def test_the_date(monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> "Clock":
            return cls(2026, 1, 31)

    monkeypatch.setattr(template, "datetime", Clock)
    assert rendered("{{ strftime_now('%d %b %Y') }}") == "31 Jan 2026"


@pytest.mark.parametrize(
    ("source", "said"),
    [("{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}", "too often"),
     ("{% for a in range(99) recursive %}{% if loop.depth < 9 %}{{ loop(range(99)) }}{% endif %}{% endfor %}", "often"),
     ("{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(40) }}", "too often"),
     ("{% set ns = namespace(x='a') %}{% for a in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}", "too large"),
     ("{% set ns = namespace(x='a') %}{% for a in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}", "too large"),
     ("{% set ns = namespace(x=[1]) %}{% for a in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}", "too large"),
     ("{% set ns = namespace(x=3) %}{% for a in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}", "too large"),
     ("{{ 10 ** 10000000000 }}", "large"), ("{{ 'a' * 10 ** 10 }}", "large"), ("{{ [1] * 10 ** 10 }}", "large"),
     ("{{ 'a'.center(10 ** 10) }}", "too large"), ("{{ 'a' | center(10000000000) }}", "too large"),
     ("{{ {} | tojson(indent=10000000000) }}", "too large"),
     ("{% for a in range(9999) %}{{ 'a' * 1000 }}{% endfor %}", "too long"),
     ("{{ raise_exception('no') }}", "no")],
)  # fmt: skip
def test_bounds(source: str, said: str) -> None:
    with pytest.raises(TemplateError, match=said):
        rendered(source)


def test_bounds_grow_with_the_messages() -> None:
    """A long chat passes nested loops that a short one may not have, and a long text comes out."""
    turns = HI * 600
    nested = "{% for a in messages %}{% for b in messages %}{% endfor %}{% endfor %}x"
    assert rendered(nested, turns) == "x"
    text = "a" * 2 * SIZE
    assert rendered("{{ messages[0].content }}", [{"role": "user", "content": text}]) == text


def test_in_any_thread() -> None:
    """Renderings side by side have limits of their own."""
    found: dict[str, str] = {}

    def render(name: str, source: str) -> None:
        try:
            found[name] = rendered(source)
        except TemplateError as error:
            found[name] = str(error)

    loop = "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}"
    threads = [threading.Thread(target=render, args=pair) for pair in (("endless", loop), ("short", "{{ 1 }}"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found == {"endless": "it loops or calls too often", "short": "1"}


PARTS = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
LOOP = "{% for part in messages[0].content if part.type == 'text' %}{{ part.text }}{% endfor %}"


@pytest.mark.parametrize(
    ("source", "of_text", "of_parts"),
    [("{{ messages[0].content | trim }}", "ab", "a\nb"),
     (LOOP, "ab", "ab"),
     ("{% if messages[0].content is string %}{{ messages[0].content }}{% else %}" + LOOP + "{% endif %}", "ab", "ab"),
     ("{{ messages[0]['content'] + bos_token }}", "ab<s>", "a\nb<s>")],
)  # fmt: skip
def test_content_as_the_template_reads_it(source: str, of_text: str, of_parts: str) -> None:
    """Parts go to a template that reads parts, and become lines for another; a text becomes a part where it must."""
    one = Template(source, {"bos_token": "<s>"})
    assert one.render(one.adapted([{"role": "user", "content": "ab"}])) == of_text
    assert one.render(one.adapted([{"role": "user", "content": PARTS}])) == of_parts
    assert one.adapted([{"role": "assistant"}]) == [{"role": "assistant"}]
