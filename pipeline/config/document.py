"""YAML as a person means it: read, changed by `section.field=value`, and written so that it reads back the same.

Everything is literal: nothing is interpolated. Words are numbers, booleans or null as in YAML 1.2's core schema, so
`yes`, `12:30` and `2024-01-31` are texts; `010`, which older and newer YAML read differently, has to be written
otherwise. Not here: what the fields mean (`pipeline.config.model`).
"""

import re
from collections import defaultdict
from typing import Any, ClassVar

import yaml

from infra.errors import ConfigError
from pipeline.data.encoding import has_lone_surrogate

_Resolvers = dict[str, list[tuple[str, re.Pattern[str]]]]
_TAG = "tag:yaml.org,2002:"
_WORDS = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", list("-+.")),
    ("merge", r"<<", ["<"]),
)
_OCTAL_OR_NOT = re.compile(r"[-+]?0[0-9]+")
_PATH = re.compile(r"(?:^|\.)([^.\[\]]+)|\[([^\[\]]+)\]")


def _resolvers() -> _Resolvers:
    """By first character, which words are what: PyYAML's table."""
    table: _Resolvers = defaultdict(list)
    for kind, pattern, first in _WORDS:
        for character in first:
            table[character].append((_TAG + kind, re.compile(rf"(?:{pattern})\Z")))
    return dict(table)


class _Loader(yaml.SafeLoader):
    """Refuses identical keys, half characters, and integers that could be octal."""

    yaml_implicit_resolvers: ClassVar[_Resolvers] = _resolvers()

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: dict[Any, Any] = {}
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key_node, yaml.ScalarNode):
                key = key_node.value if key_node.tag == f"{_TAG}merge" else self.construct_object(key_node)
                if key in seen:
                    first = seen[key].start_mark.line + 1
                    raise _refused(f"the key {key_node.value!r} stands here and in line {first}; keep one", key_node)
                seen[key] = key_node
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes what the loader would not read as a text."""

    yaml_implicit_resolvers: ClassVar[_Resolvers] = _resolvers()

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _refused(problem: str, node: Any) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def _text(loader: _Loader, node: Any) -> str:
    value = str(loader.construct_scalar(node))
    try:  # "\ud83d\ude00", as JSON writes a character of two halves, becomes the character
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
    except UnicodeDecodeError:
        raise _refused("half a character (a lone surrogate); give its other half or remove it", node) from None


def _int(loader: _Loader, node: Any) -> int:
    value = str(loader.construct_scalar(node))
    if _OCTAL_OR_NOT.fullmatch(value):
        raise _refused(
            f"{value} is {int(value)} to some readers of YAML and octal to others; write it without the leading 0, "
            "or in quotes if it is a text",
            node,
        )
    return int(value, 0)


def _float(loader: _Loader, node: Any) -> float:
    return float(str(loader.construct_scalar(node)).lower().replace(".inf", "inf").replace(".nan", "nan"))


def _written(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    """In double quotes where there are line breaks and the like, which PyYAML would not read back in every style."""
    return dumper.represent_scalar(f"{_TAG}str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _written)
_Loader.add_constructor(f"{_TAG}str", _text)
_Loader.add_constructor(f"{_TAG}int", _int)
_Loader.add_constructor(f"{_TAG}float", _float)


def read_yaml(text: str, where: str) -> Any:
    """The one document in `text`. Raises ConfigError, beginning with `where`, in one line with the place."""
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark, problem = error.problem_mark or error.context_mark, error.problem or error.context or "not YAML"
        if problem.startswith("but "):  # the second half of a sentence
            problem = f"{error.context}, {problem}"
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        hint = " (a text that holds ': ' needs quotes)" if problem.startswith("mapping values are not allowed") else ""
        raise ConfigError(f"{where}: not readable as YAML: {place}{problem}{hint}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        problem = "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise ConfigError(f"{where}: not readable as YAML: {problem}") from error


def write_yaml(data: Any) -> str:
    """YAML that `read_yaml` reads back as `data`: mappings, lists, texts, numbers, booleans, null."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def overridden(document: Any, override: str) -> Any:
    """`document` with one value replaced: `section.field=value`, where the value is YAML. `[…]` stands for an element
    of a list, or for a key with dots in it. Mappings on the way are made where there are none. Raises ConfigError."""
    if has_lone_surrogate(override):
        raise ConfigError(f"override {override!a}: not UTF-8")
    key, separator, value = override.partition("=")
    path = [dotted or bracketed for dotted, bracketed in _PATH.findall(key)]
    if not separator or not path or "".join(match.group() for match in _PATH.finditer(key)) != key:
        raise ConfigError(f"override {override!r}: expected section.field=value, for example train.steps=10")
    return _replaced(document, path, _value(value, f"override {override!r}"), f"override {override!r}", "")


def _value(text: str, where: str) -> Any:
    read = read_yaml(text, where)
    tokens = [token for token in yaml.scan(text) if not isinstance(token, yaml.StreamEndToken | yaml.BlockEndToken)]
    if text[tokens[-1].end_mark.index :].strip():
        raise ConfigError(f"{where}: what follows ' #' is a comment to YAML; put the value into quotes of its own")
    return read


def _replaced(value: Any, path: list[str], new: Any, where: str, at: str) -> Any:
    if not path:
        return new
    head, rest = path[0], path[1:]
    if isinstance(value, list):
        if not head.isdecimal() or int(head) >= len(value):
            raise ConfigError(f"{where}: {at} is a list of {len(value)}, {head!r} is none of its elements (from 0)")
        changed = list(value)
        changed[int(head)] = _replaced(value[int(head)], rest, new, where, f"{at}[{head}]")
        return changed
    if value is not None and not isinstance(value, dict):
        raise ConfigError(f"{where}: {at} is {value!r}, which has no fields")
    below = (value or {}).get(head)
    return {**(value or {}), head: _replaced(below, rest, new, where, f"{at}.{head}".removeprefix("."))}
