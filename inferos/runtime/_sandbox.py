"""A Jinja2 that can run a hostile template: it reads nothing, calls nothing of ours, and ends.

A chat template is a program from whoever made the model. Jinja2's own sandbox keeps it from Python's internals, but
lets it loop for hours or ask for 10 GB with ``{{ 'a' * 10**10 }}``, and a thread that does cannot be stopped. So here

- only what is listed may be used: statements, filters, attributes, functions; no loader exists, so nothing is included;
- every loop iteration, macro call, filter, operator and call spends from a budget of steps, of characters and of time;
- every value a template makes is weighed (characters and elements, as often as they would be printed, and depth)
  before it is used, so no single operation between two checks is long, and nothing is built that is too large;
- what can multiply its input (``*``, ``**``, replace, join, indent, format, range, tojson) is checked before it runs.

No thread, signal or process is needed, so this works the same on every system. Nothing is folded while compiling: the
size of the source, its number of nodes and its number of assignments bound that time.
"""

from __future__ import annotations

import functools
import html
import json
import re
import string
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jinja2
import jinja2.ext
import jinja2.filters
import jinja2.runtime
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

__all__ = ["Budget", "Sandbox"]

MAX_SOURCE = 64 << 10
MAX_NODES = 10_000
MAX_ASSIGNMENTS = 1000
# A statement with a scope of its own costs the compiler as much as this many other parts.
_SCOPE_PARTS = 16
MAX_DEPTH = 64
MAX_RANGE = 10_000
MAX_INT_BITS = 4096
MAX_NEEDLE = 1024
MAX_SECONDS = 5.0

_SCOPES = (nodes.For, nodes.Macro, nodes.CallBlock, nodes.FilterBlock, nodes.With, nodes.AssignBlock, nodes.Scope)
_STATEMENTS = (*_SCOPES, nodes.Output, nodes.If, nodes.Assign, nodes.Break, nodes.Continue)
# fmt: off
_FILTERS = (
    "abs", "capitalize", "dictsort", "float", "groupby", "int", "items", "list", "lower", "map", "max", "min", "reject",
    "rejectattr", "reverse", "select", "selectattr", "sort", "string", "title", "unique", "upper",
)
# These take what exists and make nothing: they cost one step, whatever they are given.
_CHEAP_FILTERS = ("count", "d", "default", "first", "last", "length")
_STR_METHODS = frozenset({
    "capitalize", "casefold", "count", "endswith", "find", "format", "index", "isalnum", "isalpha", "isdecimal",
    "isdigit", "islower", "isnumeric", "isspace", "isupper", "join", "lower", "lstrip", "partition", "removeprefix",
    "removesuffix", "replace", "rfind", "rindex", "rpartition", "rsplit", "rstrip", "split", "splitlines",
    "startswith", "strip", "swapcase", "title", "upper",
})
_LOOP = frozenset({
    "changed", "cycle", "depth", "depth0", "first", "index", "index0", "last", "length", "nextitem", "previtem",
    "revindex", "revindex0",
})
# fmt: on
_ATTRIBUTES: tuple[tuple[type, frozenset[str]], ...] = (
    (str, _STR_METHODS),
    (dict, frozenset({"get", "items", "keys", "values"})),
    (list, frozenset({"count", "index"})),
    (tuple, frozenset({"count", "index"})),
    (jinja2.runtime.LoopContext, _LOOP),
)
_ATOMS = (str, int, float, bool, type(None), jinja2.Undefined)
# The last three are the views that a dict's own methods give.
_CONTAINERS: tuple[type[Collection[Any]], ...] = (
    dict,
    list,
    tuple,
    type({}.keys()),
    type({}.values()),
    type({}.items()),
)


class Budget:
    """What one rendering may still spend.

    Parameters
    ----------
    given : plain data
        What the template is given; the limits grow with its size. It must live, unchanged, as long as the budget.
    clock : seconds, monotonic
    """

    def __init__(self, given: Any, clock: Callable[[], float] = time.monotonic) -> None:
        # id of a container in `given` -> its weight and height, so that passing it around again costs one step.
        self._known: dict[int, tuple[int, int]] = {}
        size, _ = self._measure(given)
        self.value = (1 << 20) + 4 * size
        self.output = (1 << 20) + 4 * size
        self.steps = 500_000 + 8 * size
        self.characters = (16 << 20) + 64 * size
        self._clock = clock
        self._deadline = clock() + MAX_SECONDS

    def _measure(self, item: Any) -> tuple[int, int]:
        """Weight and height of plain data."""
        if isinstance(item, str):
            return 1 + len(item), 0
        if not isinstance(item, (dict, list)):
            return 1 + (item.bit_length() // 3 if isinstance(item, int) else 0), 0
        parts = [self._measure(part) for part in ([*item.keys(), *item.values()] if isinstance(item, dict) else item)]
        found = 1 + sum(weight for weight, _ in parts), 1 + max((height for _, height in parts), default=0)
        self._known[id(item)] = found
        return found

    def spend(self, steps: int = 1, characters: int = 0) -> None:
        """Take from what is left. Raises SecurityError when it is used up."""
        self.steps -= steps
        self.characters -= characters
        if self.steps < 0 or self.characters < 0:
            raise SecurityError("it does too much work")
        if self._clock() > self._deadline:
            raise SecurityError(f"it runs longer than {MAX_SECONDS:g} s")

    def reserve(self, size: int) -> None:
        """Check the size of a value before it is made."""
        if size > self.value:
            raise SecurityError(f"it makes a value of {size} characters, more than {self.value}")
        self.spend(1, size)

    def weigh(self, value: Any) -> int:
        """Characters and elements of a value, counted as often as they would be printed.

        Raises
        ------
        SecurityError
            If it is too large, too deep, or holds something that is not plain data.
        """
        total = elements = 0
        stack: list[tuple[Any, int]] = [(value, 0)]
        while stack:
            item, depth = stack.pop()
            elements += 1
            total += 1
            if isinstance(item, str):
                total += len(item)
            elif isinstance(item, int):
                total += item.bit_length() // 3
                if item.bit_length() > MAX_INT_BITS:
                    raise SecurityError("it makes a number that is too large")
            elif isinstance(item, _CONTAINERS):
                weight, height = self._known.get(id(item), (0, 0))
                if depth + height >= MAX_DEPTH:
                    raise SecurityError(f"it nests values deeper than {MAX_DEPTH}")
                if weight:
                    total += weight - 1
                elif len(item) > self.value:
                    raise SecurityError(f"it makes a value of {len(item)} elements, more than {self.value}")
                else:
                    inner = [*item.keys(), *item.values()] if isinstance(item, dict) else item
                    stack.extend((child, depth + 1) for child in inner)
            elif depth and isinstance(item, (Namespace, jinja2.runtime.LoopContext)):
                raise SecurityError("it puts a namespace or a loop into a value")
            if total + len(stack) > self.value:
                raise SecurityError(f"it makes a value of more than {self.value} characters")
        self.spend(elements)
        return total


class _Generation(jinja2.ext.Extension):
    """``{% generation %}`` marks the assistant's part for training; here it means nothing."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own form

    def parse(self, parser: Any) -> list[nodes.Node]:
        next(parser.stream)
        body: list[nodes.Node] = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return body


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment. One template at a time per thread; threads do not disturb each other.

    Parameters
    ----------
    functions : name -> function
        What a template may call besides `range`, `dict` and `namespace`.
    """

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})

    def __init__(self, functions: Mapping[str, Callable[..., Any]]) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            autoescape=False,
            cache_size=0,
            finalize=_finalize,
            extensions=[jinja2.ext.loopcontrols, _Generation],
        )
        self._local = threading.local()
        # Bound once: `call` knows its own functions by identity.
        self.tick, self.made, self.joined = self._tick, self._made, self._joined
        self.globals = {"range": self._range, "dict": dict, "namespace": Namespace, **functions}
        self._callables = [self.made, self.joined, *self.globals.values()]
        own = {
            "replace": self._replace,
            "join": jinja2.pass_environment(_join),
            "indent": self._indent,
            "tojson": self._tojson,
            "round": _round,
            "trim": _trim,
            "safe": str,
            "e": _escape,
            "escape": _escape,
        }
        plain = {name: jinja2.filters.FILTERS[name] for name in _FILTERS}
        cheap = {name: self._counted(jinja2.filters.FILTERS[name]) for name in _CHEAP_FILTERS}
        self.filters = {**cheap, **{name: self._guarded(function) for name, function in {**plain, **own}.items()}}

    @property
    def budget(self) -> Budget:
        """The budget of the rendering in this thread."""
        budget: Budget = self._local.budget
        return budget

    @budget.setter
    def budget(self, value: Budget) -> None:
        self._local.budget = value

    def render(self, template: jinja2.Template, budget: Budget, variables: Mapping[str, Any]) -> str:
        """The template's output.

        Raises
        ------
        SecurityError
            If it does what it may not, or too much of it.
        jinja2.TemplateError, or any error a template can cause
            If it fails.
        """
        self.budget = budget
        parts: list[str] = []
        size = 0
        for part in template.generate(**variables):
            size += len(part)
            if size > budget.output:
                raise SecurityError(f"it prints more than {budget.output} characters")
            parts.append(part)
        return "".join(parts)

    # ---- compiling ----

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        if len(source) > MAX_SOURCE:
            raise SecurityError(f"it is {len(source)} characters long, more than {MAX_SOURCE}")
        tree = super()._parse(source, name, filename)
        self._refuse(tree)
        self._instrument(tree)
        tree.set_environment(self)
        return tree

    def _refuse(self, tree: nodes.Template) -> None:
        """Refuse what is not listed, and what would take the compiler long."""
        seen = assigned = 0
        stack: list[nodes.Node] = [tree]
        while stack:
            node = stack.pop()
            seen += _SCOPE_PARTS if isinstance(node, _SCOPES) else 1
            assigned += isinstance(node, (nodes.Assign, nodes.AssignBlock))
            if isinstance(node, nodes.Stmt) and not isinstance(node, _STATEMENTS):
                raise SecurityError(f"it uses {type(node).__name__.lower()}, which a chat template may not")
            if seen > MAX_NODES or assigned > MAX_ASSIGNMENTS:
                raise SecurityError(f"it has more than {MAX_NODES} parts or {MAX_ASSIGNMENTS} assignments")
            stack.extend(node.iter_child_nodes())

    def _instrument(self, node: nodes.Node) -> None:
        """Put a tick into every body that can run twice, and a check around every value that is made."""
        for field, value in node.iter_fields():
            if isinstance(value, nodes.Node):
                setattr(node, field, self._checked(value))
            elif isinstance(value, list):
                value[:] = [self._checked(v) if isinstance(v, nodes.Node) else v for v in value]
        if isinstance(node, (nodes.For, nodes.Macro, nodes.CallBlock)):
            printed = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
            tick = self._own("tick", [nodes.Const(printed)])
            node.body.insert(0, nodes.ExprStmt(tick, lineno=node.lineno))
        if isinstance(node, nodes.For) and node.test is not None:
            # A tick is None, so this is the test's own value.
            node.test = nodes.Or(self._own("tick", [nodes.Const(0)]), node.test)

    def _checked(self, node: nodes.Node) -> nodes.Node:
        self._instrument(node)
        if isinstance(node, nodes.Concat):
            return self._own("joined", node.nodes)
        if isinstance(node, (nodes.List, nodes.Dict)) or (isinstance(node, nodes.Tuple) and node.ctx == "load"):
            return self._own("made", [node])
        return node

    def _own(self, name: str, arguments: list[nodes.Expr]) -> nodes.Call:
        return nodes.Call(nodes.EnvironmentAttribute(name), arguments, [], None, None, lineno=1)

    # ---- running ----

    def getattr(self, obj: Any, attribute: str) -> Any:
        for kind, allowed in _ATTRIBUTES:
            if isinstance(obj, kind) and attribute in allowed:
                return getattr(obj, attribute)
        if isinstance(obj, dict):
            # A key that is also a method's name, such as "copy", is the key.
            return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        if attribute.startswith("_"):
            raise SecurityError(f"it reads {attribute!r} of {type(obj).__name__}")
        if isinstance(obj, (Namespace, jinja2.Undefined)):
            try:
                return getattr(obj, attribute)
            except AttributeError:
                return self.undefined(obj=obj, name=attribute)
        if hasattr(obj, attribute):
            raise SecurityError(f"it reads {attribute!r} of {type(obj).__name__}")
        return self.undefined(obj=obj, name=attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        if isinstance(obj, (str, list, tuple, dict, range, jinja2.Undefined)):
            try:
                return obj[argument]
            except (TypeError, LookupError):
                pass
        if isinstance(argument, str):
            return self.getattr(obj, argument)
        return self.undefined(obj=obj, name=argument)

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        budget = self.budget
        if obj is self.tick:
            budget.spend(1, args[0])
            return None
        budget.weigh(args)
        given = {name: value for name, value in kwargs.items() if name not in ("caller", "_loop_vars", "_block_vars")}
        budget.weigh(given)
        owner = getattr(obj, "__self__", None)
        if isinstance(owner, str):
            result = self._call_str(obj.__name__, owner, args, given)
        elif isinstance(owner, (dict, list, tuple)):
            result = obj(*args, **given)
        elif isinstance(obj, (jinja2.runtime.Macro, jinja2.runtime.LoopContext)) or any(
            obj is c for c in self._callables
        ):
            result = super().call(context, obj, *args, **kwargs)
        elif isinstance(owner, jinja2.runtime.LoopContext):
            result = obj(*args, **given)
        elif isinstance(obj, jinja2.Undefined):
            result = obj()  # raises UndefinedError with the name
        else:
            raise SecurityError(f"it calls a {type(obj).__name__}")
        return self._weighed(result)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        budget = self.budget
        if operator == "*":
            for one, other in ((left, right), (right, left)):
                if isinstance(one, (str, list, tuple)) and isinstance(other, int):
                    budget.reserve(budget.weigh(one) * max(other, 0))
        elif operator == "**" and not (_small(left, 32) and _small(right, 7)):
            raise SecurityError("it raises to a large power")
        elif operator == "%" and isinstance(left, str):
            raise SecurityError("it formats with %; a chat template may use ~ or format")
        elif operator == "+" and isinstance(left, (str, list, tuple)) and isinstance(right, (str, list, tuple)):
            budget.reserve(len(left) + len(right))
        return self._weighed(super().call_binop(context, operator, left, right))

    def _weighed(self, value: Any) -> Any:
        """What was made, checked. A lazy sequence becomes a list: chains of generators would nest without bound."""
        if isinstance(value, Iterator):
            value = list(self._ticking(value))
        self.budget.spend(1, self.budget.weigh(value))
        return value

    def _ticking(self, values: Iterator[Any]) -> Iterator[Any]:
        for value in values:
            self.budget.spend()
            yield value

    def _guarded(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter whose arguments and result are weighed."""
        skipped = 1 if hasattr(function, "jinja_pass_arg") else 0

        @functools.wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            self.budget.weigh(args[skipped:])
            self.budget.weigh(kwargs)
            return self._weighed(function(*args, **kwargs))

        return guarded

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter that costs one step."""

        @functools.wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.budget.spend()
            return function(*args, **kwargs)

        return counted

    def _call_str(self, name: str, owner: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A str method, with what it could blow up checked first."""
        if name == "replace" and len(args) >= 2:
            return self._replace(owner, *args, **kwargs)
        if name == "join" and len(args) == 1:
            return _join(self, args[0], owner)
        if name == "format":
            return self._format(owner, args, kwargs)
        if any(isinstance(a, str) and len(a) > MAX_NEEDLE for a in (*args, *kwargs.values())):
            raise SecurityError(f"it gives {name} an argument of more than {MAX_NEEDLE} characters")
        self.budget.spend(1, len(owner))
        return getattr(owner, name)(*args, **kwargs)

    # ---- what a template may call ----

    def _tick(self, printed: int) -> None:
        raise NotImplementedError  # `call` does it, without the way through arguments

    def _made(self, value: Any) -> Any:
        return value

    def _joined(self, *values: Any) -> str:
        return "".join([_text(value) for value in values])

    def _range(self, *bounds: Any) -> range:
        made = range(*bounds)
        # len() itself overflows for huge ranges.
        if abs((made.stop - made.start) // made.step) > MAX_RANGE:
            raise SecurityError(f"it asks for a range of more than {MAX_RANGE}")
        return made

    def _replace(self, text: Any, old: Any, new: Any, count: int | None = None) -> str:
        text, old, new = _text(text), _text(old), _text(new)
        times = text.count(old) if count is None or count < 0 else min(text.count(old), count)
        self.budget.reserve(len(text) + times * max(0, len(new) - len(old)))
        return str(text.replace(old, new, -1 if count is None else count))

    def _indent(self, text: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
        text = _text(text)
        size = len(width) if isinstance(width, str) else int(width)
        self.budget.reserve(len(text) + (1 + text.count("\n")) * max(size, 1))
        return str(jinja2.filters.do_indent(text, width, first, blank))

    def _tojson(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """JSON as transformers writes it into prompts: no HTML escapes."""
        if indent is not None and not (_small(indent, 4) and indent >= 0):
            raise SecurityError("it asks for JSON with a deep indent")
        if separators is not None and sum(len(_text(part)) for part in separators) > 16:
            raise SecurityError("it asks for JSON with long separators")
        encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
        parts: list[str] = []
        size = 0
        for part in encoder.iterencode(value):
            size += len(part)
            if size > self.budget.value:
                raise SecurityError(f"it makes JSON of more than {self.budget.value} characters")
            parts.append(part)
        return "".join(parts)

    def _format(self, text: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        size, count = len(text), 0
        for _, field, spec, conversion in string.Formatter().parse(text):
            if field is None:
                continue
            count += 1
            if spec or conversion or not re.fullmatch(r"[0-9A-Za-z_]*", field):
                raise SecurityError("it formats with more than plain {} fields")
        longest = max((len(_text(value)) for value in (*args, *kwargs.values())), default=0)
        self.budget.reserve(size + count * longest)
        return text.format(*(_text(a) for a in args), **{name: _text(value) for name, value in kwargs.items()})


@jinja2.pass_context
def _finalize(context: Any, value: Any) -> str:
    budget: Budget = context.environment.budget
    text = _text(value) if isinstance(value, _ATOMS) else _text(value, budget)
    budget.reserve(len(text))
    return text


def _text(value: Any, budget: Budget | None = None) -> str:
    """What `value` prints as; only plain data prints."""
    if isinstance(value, str):
        return value
    if not isinstance(value, (*_ATOMS, *_CONTAINERS, range)):
        raise SecurityError(f"it prints a {type(value).__name__}")
    if budget is not None:
        budget.weigh(value)
    return str(value)


def _join(environment: Sandbox, value: Any, d: Any = "", attribute: str | int | None = None) -> str:
    """`join` with the length of the result known before it is made."""
    if attribute is not None:
        value = map(jinja2.filters.make_attrgetter(environment, attribute), value)
    budget, between, size = environment.budget, _text(d), 0
    parts: list[str] = []
    for item in value:
        parts.append(_text(item, budget))
        size += len(parts[-1]) + len(between)
        if size > budget.value:
            raise SecurityError(f"it makes a value of more than {budget.value} characters")
    return between.join(parts)


def _round(value: Any, precision: int = 0, method: str = "common") -> float:
    if not _small(precision, 5):
        raise SecurityError("it rounds to a huge precision")
    return float(jinja2.filters.do_round(value, precision, method))  # type: ignore[arg-type]


def _trim(value: Any, chars: str | None = None) -> str:
    if chars is not None and len(chars) > MAX_DEPTH:
        raise SecurityError("it trims too many different characters")
    return _text(value).strip(chars)


def _escape(value: Any) -> str:
    return html.escape(_text(value))


def _small(value: Any, bits: int) -> bool:
    return isinstance(value, float) or (isinstance(value, int) and value.bit_length() <= bits)
