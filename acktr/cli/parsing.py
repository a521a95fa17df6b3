"""From words to options: how values are written, and what is wrong with them, in one line.

tyro parses. What it would say in a box about words that it refuses becomes the message of a
:class:`UsageError`; what it would say about values is said by the rules here, in the words of
users. Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    UnsupportedTypeAnnotationError,
)

from acktr.cli.flags import HELP, HELP_ALL, REPEATED, UsageError

_EXACT = 2**53
"""Integers up to here are exact as floating-point numbers."""
_POWER = re.compile(r"[+-]?\d{1,20}(\.\d{1,20})?[eE]\+?\d{1,3}")
_WIDTH = 100_000
"""Columns of the parser's box, so that it breaks no line."""
_RULE = re.compile(r"^[─-]{8,}$")
_COLOUR = re.compile(r"\x1b\[[\d;]*m")
_ABOUT = re.compile(r"^Error parsing ([^\s:]+): ")

Parsed = TypeVar("Parsed")
JsonObject = Mapping[str, Any]
"""JSON values by name; :data:`acktr.config.JsonObject`."""


def peek(args: Sequence[str], name: str) -> str | None:
    """The last value of an option, before the command line is parsed properly."""
    value = None
    for arg, following in zip_longest(args, args[1:]):
        if arg == f"--{name}" and following is not None:
            value = following
        elif arg.startswith(f"--{name}="):
            value = arg.partition("=")[2]
    return value


def parse(
    kind: type[Parsed],
    args: Sequence[str],
    command: str,
    default: Any = tyro.MISSING_NONPROP,
) -> Parsed:
    """Parse the words of a command.

    Raises:
        SystemExit: After its help.
        UsageError: Words that it does not take, or options that do not go together.
    """
    words = _gathered(args)
    said = io.StringIO()
    helps = HELP.intersection(words)
    width = contextlib.nullcontext() if helps else environment({"COLUMNS": str(_WIDTH)})
    try:
        with contextlib.redirect_stderr(said), width:
            parsed: Parsed = tyro.cli(
                kind, prog=f"acktr {command}", args=words, default=default, registry=_REGISTRY
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UsageError(_in_one_line(said.getvalue(), kind.__name__, command)) from None
    return parsed


@contextlib.contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables, also of the processes that are started meanwhile."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _in_one_line(box: str, kind: str, command: str) -> str:
    """What the parser says in a box.

    Args:
        box: Its lines; below the title (and a rule, without Unicode) comes what is wrong, then,
            after a rule, where help is.
        kind: Class of the options, which the box names where they do not go together.
        command: The command.
    """
    rows = [row.strip("│ ") for row in _COLOUR.sub("", box).splitlines()]
    parts: list[list[str]] = [[]]
    for row in rows[1:-1]:  # without title and border
        if _RULE.match(row):
            parts.append([])
        elif row:
            parts[-1].append(row)
    text = " ".join(next(filter(None, parts), rows))
    about = _ABOUT.match(text)
    if about is None:  # about words, not about the value of an option
        page = f"acktr {command} {HELP_ALL if command == 'train' else '--help'}"
        return f"{text[:1].lower()}{text[1:].rstrip('.')}; see {page}"
    what = text[about.end() :]
    group = about[1].removeprefix("settings").removeprefix(".")
    named = group in ("", kind) or what.startswith(f"{group}.")
    return what if named else f"{group}: {what}"


_REGISTRY = ConstructorRegistry()


@_REGISTRY.primitive_rule
def _key_values(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[JsonObject] | None:
    """How JSON values by name are written: KEY=VALUE, with text where the value is no JSON."""
    if info.type != JsonObject:
        return None
    return PrimitiveConstructorSpec(
        nargs="*",
        metavar="[KEY=VALUE ...]",
        instance_from_str=lambda words: dict(map(_key_value, words)),
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda values: [f"{k}={json.dumps(v)}" for k, v in values.items()],
    )


@_REGISTRY.primitive_rule
def _integers(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[int] | None:
    """How integers are written: also as 1e6."""
    if info.type is not int:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT",
        instance_from_str=lambda words: _integer(words[0]),
        is_instance=lambda value: isinstance(value, int) and not isinstance(value, bool),
        str_from_instance=lambda value: [str(value)],
    )


@_REGISTRY.primitive_rule
def _numbers(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[float] | None:
    """How other numbers are written."""
    if info.type is not float:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="FLOAT",
        instance_from_str=lambda words: _number(words[0]),
        is_instance=lambda value: isinstance(value, int | float) and not isinstance(value, bool),
        str_from_instance=lambda value: [str(value)],
    )


@_REGISTRY.primitive_rule
def _choices(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """How one of several words is written."""
    values = _by_word(info.type)
    if not values:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=f"{{{','.join(values)}}}",
        instance_from_str=lambda words: _choice(words[0], values),
        is_instance=lambda value: value in values.values(),
        str_from_instance=lambda value: [str(value)],
    )


@_REGISTRY.primitive_rule
def _sequences(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """How several values are written: one after another."""
    if typing.get_origin(info.type) is not tuple:
        return None
    item = _spec(typing.get_args(info.type)[0], info)
    return PrimitiveConstructorSpec(
        nargs="*",
        metavar=f"[{item.metavar} [{item.metavar} ...]]",
        instance_from_str=lambda words: tuple(item.instance_from_str([word]) for word in words),
        is_instance=lambda value: isinstance(value, tuple) and all(map(item.is_instance, value)),
        str_from_instance=lambda values: [w for v in values for w in item.str_from_instance(v)],
    )


@_REGISTRY.primitive_rule
def _unions(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """How a value is written that may also be a word, such as None."""
    if typing.get_origin(info.type) not in (Union, UnionType):
        return None
    kinds = sorted(typing.get_args(info.type), key=lambda kind: kind is not NoneType)
    words = {word: value for kind in kinds for word, value in _by_word(kind).items()}
    other = _spec(next(kind for kind in kinds if not _by_word(kind)), info)

    def instance(given: list[str]) -> Any:
        if len(given) == 1 and given[0] in words:
            return words[given[0]]
        try:
            return other.instance_from_str(given)
        except ValueError as error:
            raise ValueError(f"{error}, nor {' or '.join(words)}") from None

    return PrimitiveConstructorSpec(
        nargs=other.nargs,
        metavar="|".join(_spec(kind, info).metavar for kind in kinds),
        instance_from_str=instance,
        is_instance=lambda value: value in words.values() or other.is_instance(value),
        str_from_instance=lambda value: (
            [str(value)] if value in words.values() else other.str_from_instance(value)
        ),
    )


def _spec(kind: Any, outer: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any]:
    """How a value of a kind is written that is a part of another."""
    inner = PrimitiveTypeInfo.make(raw_annotation=kind, parent_markers=outer.markers)
    spec = ConstructorRegistry.get_primitive_spec(inner)
    if isinstance(spec, UnsupportedTypeAnnotationError):
        raise spec
    return spec


def _by_word(kind: Any) -> dict[str, Any]:
    """The values of None or Literal by how they are written; none of another kind."""
    if kind is NoneType:
        return {"None": None}
    choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
    return {str(value): value for value in choices}


def _integer(word: str) -> int:
    """The integer of 100000, 100_000 or 1e5."""
    if _POWER.fullmatch(word):
        value = float(word)
        if value.is_integer() and abs(value) <= _EXACT:
            return int(value)
    try:
        return int(word)
    except ValueError:
        raise ValueError(f"{word!r:.60} is no integer, such as 100000 or 1e5") from None


def _number(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        raise ValueError(f"{word!r:.60} is no number, such as 0.5 or 1e-3") from None


def _choice(word: str, values: Mapping[str, Any]) -> Any:
    if word not in values:
        raise ValueError(f"{word!r:.60} is not one of {', '.join(values)}")
    return values[word]


def _key_value(word: str) -> tuple[str, Any]:
    key, equals, text = word.partition("=")
    if not key or not equals:
        raise ValueError(f"{word!r} must be written as KEY=VALUE")
    try:
        return key, json.loads(text)
    except json.JSONDecodeError:
        return key, text


def _gathered(args: Sequence[str]) -> list[str]:
    """The words of a command with each option that may be repeated once, at the end."""
    rest: list[str] = []
    lists: dict[str, list[str]] = {}
    current = rest
    for arg in args:
        name, equals, value = arg.partition("=")
        if not arg.startswith("-"):
            current.append(arg)
        elif name.replace("_", "-") in REPEATED:
            current = lists.setdefault(REPEATED[name.replace("_", "-")], [])
            current += [value] if equals else []
        else:
            current = rest
            rest.append(arg)
    return [*rest, *(word for name, words in lists.items() for word in (name, *words))]
