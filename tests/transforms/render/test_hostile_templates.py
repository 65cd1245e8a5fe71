"""Templates that try to get out, to go on for ever or to swell: each is refused, by name and with a number."""

from collections.abc import Iterator
from typing import Any

import pytest

from moebeam.schemas.errors import JobFileError, MoebeamError, TemplateBudgetExceeded, TemplateFailed
from moebeam.schemas.job.sections import PromptSection
from moebeam.schemas.records import Message
from moebeam.transforms.render.prompt_template import PromptTemplate

ROW: dict[str, Any] = {
    "text": "hello",
    "order": {"id": 1},
    "markup": "http://" * 20_000 + "(" * 100_000,
    "words": "a " * 300_000,
    "digits": "9" * 4000,
    "number": 300_000_000,
}

ESCAPES = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''|attr('__class__') }}",
    "{{ ''['__class__'] }}",
    "{{ order['__class__'] }}",
    "{{ '{0.__class__}'.format('x') }}",
    "{{ '{a.__class__}'.format_map({'a': 1}) }}",
    "{{ ('{0.__class__}'|attr('format'))('x') }}",
    "{{ text.format.__self__ }}",
    "{{ ['x']|map(attribute='__class__')|list }}",
    "{{ ['x']|map('attr', '__class__')|list }}",
    "{{ ['x']|sum(attribute='__class__') }}",
    "{{ ['x']|groupby('__class__') }}",
    "{{ ['x']|selectattr('__class__')|first }}",
    "{{ lipsum.__globals__ }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ joiner.__init__ }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ range.__init__ }}",
    "{{ nobody.__class__ }}",
    "{% macro m() %}{% endmacro %}{{ m._func.__globals__ }}",
    "{% macro m() %}{% endmacro %}{{ m._environment }}",
    "{% macro m() %}{{ caller.__class__ }}{% endmacro %}{% call m() %}{% endcall %}",
    "{% for x in [1] %}{{ loop._undefined }}{% endfor %}",
    "{{ ([1]|map('string')).gi_frame.f_globals }}",
    "{{ ([1]|select|attr('gi_frame'))|attr('f_back') }}",
    "{% set l = [1] %}{{ l.append(2) }}",
    "{{ order.update({'x': 1}) }}",
    "{% include '/etc/passwd' %}",
    "{% import 'x' as y %}",
    "{% extends '/etc/passwd' %}",
    "{{ {'a>b': 1}|xmlattr }}",
    "{{ range(10**12)|list|length }}",
)

LARGE = (
    "{{ ('a' * 400)|replace('a', 'b' * 30000000)|length }}",
    "{{ ('a' * 400).replace('a', 'b' * 30000000)|length }}",
    "{{ range(400)|join('b' * 30000000)|length }}",
    "{{ ('b' * 30000000).join('a' * 400)|length }}",
    "{{ '{:>{}}'.format('x', 8000000000)|length }}",
    "{{ ('%*d' % (2000000000, 1))|length }}",
    "{{ 'x'.zfill(8000000000)|length }}",
    "{{ ('\t' * 1000000).expandtabs(1000000)|length }}",
    "{{ ('a' * 1000000).translate({97: 'b' * 1000})|length }}",
    "{{ ['a']|map('center', 8000000000)|list|length }}",
    "{{ ['a\nb']|map('indent', 8000000000)|list|length }}",
    "{{ [1]|tojson(indent=8000000000)|length }}",
    "{{ 'x'|center(width=8000000000) }}",
    "{% filter center(8000000000) %}x{% endfilter %}",
    "{{ ('a\n' * 400)|indent('b' * 30000000)|length }}",
    "{{ ('a ' * 400)|wordwrap(1, true, 'b' * 30000000)|length }}",
    "{{ ('http://a.bc ' * 400)|urlize(target='x' * 30000000)|length }}",
    "{{ 1|round(400000000, 'floor') }}",
    "{{ 1|round(number, 'floor') }}",
    "{{ [1]|batch(300000000)|list }}",
    "{{ [1]|batch(3000000, 'x')|list }}",
    "{{ [text] * 100000000 }}",
    "{{ words * 1000 }}",
    "{{ (((2**64)**64)**64)**64 }}",
    "{% set n = namespace(v=10) %}{% for i in range(60) %}{% set n.v = n.v * n.v %}{% endfor %}{{ n.v > 1 }}",
    "{% set n = namespace(v=[]) %}{% for i in range(5000) %}{% set n.v = n.v + ['x' * 30000000] %}{% endfor %}",
    "{% set n = namespace(v='x') %}{% for i in range(40) %}{% set n.v = n.v ~ n.v %}{% endfor %}",
    "{% set n = namespace(v=[1]) %}{% for i in range(40) %}{% set n.v = n.v + n.v %}{% endfor %}",
)

ENDLESS = (
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% set moebeam_step = namespace(step=''.upper) %}{% for i in range(99999) %}{% endfor %}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% for x in [[]] recursive %}{{ loop([[]]) }}{% endfor %}",
    "{% for i in range(900) %}{{ range(99999)|map('string')|map('upper')|join|length }}{% endfor %}",
    "{{ ([[1]] * 1000000)|sum(start=[])|length }}",
    "{% set n = namespace(v=[]) %}{% for i in range(90) %}{% set n.v = [n.v, n.v] %}{% endfor %}{{ n.v|tojson }}",
    "{% for i in range(900) %}{{ (words * 50)|title|length }}{% endfor %}",
    "{% for i in range(900) %}{{ (digits|int) ** 9 % (digits|int) }}{% endfor %}",
    "{% for i in range(900) %}{{ markup|urlize|striptags|length }}{% endfor %}",
)


def render(source: str, max_template_s: float = 0.2) -> str:
    (message,) = PromptTemplate(PromptSection(template=source, max_template_s=max_template_s)).render(ROW)
    return message.content


@pytest.mark.parametrize("source", ESCAPES)
def test_no_template_gets_out(source: str) -> None:
    with pytest.raises(TemplateFailed):
        render(source)


@pytest.mark.parametrize("source", LARGE)
def test_what_swells_is_refused_with_the_size(source: str) -> None:
    with pytest.raises(TemplateBudgetExceeded, match=r"expected .*(\d|MiB of memory).*, found "):
        render(source, max_template_s=20.0)


@pytest.mark.parametrize("source", ENDLESS)
def test_what_goes_on_is_refused_with_the_limit(source: str) -> None:
    with pytest.raises(TemplateBudgetExceeded, match=r"max_template_s|calls itself without end"):
        render(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
        "{{ " + "-" * 20000 + "1 }}",
        "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
        "{{ " + "9" * 5000 + " }}",
    ],
)
def test_what_cannot_be_compiled_is_told_before_the_run(source: str) -> None:
    with pytest.raises(JobFileError, match=r"\[prompt\]"):
        render(source)


def test_the_budget_is_no_name_that_templates_can_see_or_shadow() -> None:
    template = PromptTemplate(PromptSection(template="{{ _moebeam_budget }}{{ budget }}{{ environment }}"))
    assert template.columns.variables == {"_moebeam_budget", "budget", "environment"}
    assert template.render(dict.fromkeys(template.columns.variables, "mine")) == (Message("user", "mine" * 3),)


def test_rows_beside_a_hostile_one_are_rendered() -> None:
    source = "{% if text == 'bad' %}{{ ([[1]] * 1000000)|sum(start=[])|length }}{% endif %}{{ text }}"
    template = PromptTemplate(PromptSection(template=source, max_template_s=0.2))
    texts = ["a", "bad", "b", "bad", "c"]
    assert list(describe(template.render_batch([{"text": text} for text in texts]))) == [
        "a",
        "TemplateBudgetExceeded",
        "b",
        "TemplateBudgetExceeded",
        "c",
    ]


def describe(results: list[Any]) -> Iterator[str]:
    for result in results:
        yield type(result).__name__ if isinstance(result, MoebeamError) else result[0].content
