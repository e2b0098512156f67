"""Writes TOML, of which the standard library only reads. For configuration files that a person will look at.

Knows what configurations hold: tables, arrays of tables, strings, numbers, booleans and arrays of these.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

_BARE_KEY: Final = re.compile(r"[A-Za-z0-9_-]+\Z")


def toml_text(tree: Mapping[str, Any], comment: str = "") -> str:
    """The mapping as TOML; a key whose value is None is left out.

    Args:
        tree: nested mappings; a sequence of mappings becomes an array of tables.
        comment: put on top, a line per line.
    """
    head = [f"# {line}" for line in comment.splitlines()]
    return "\n".join([*head, *_table(tree, ())]) + "\n"


def _table(tree: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[str]:
    nested = {key: value for key, value in tree.items() if _is_table(value) or _is_tables(value)}
    for key, value in tree.items():
        if key not in nested and value is not None:
            yield f"{_key(key)} = {_value(value)}"
    for key, value in nested.items():
        inner = (*path, _key(key))
        tables = [value] if _is_table(value) else value
        brackets = ("[", "]") if _is_table(value) else ("[[", "]]")
        for table in tables:
            yield ""
            yield f"{brackets[0]}{'.'.join(inner)}{brackets[1]}"
            yield from _table(table, inner)


def _is_table(value: Any) -> bool:
    return isinstance(value, Mapping)


def _is_tables(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and bool(value) and all(map(_is_table, value))


def _key(key: str) -> str:
    return key if _BARE_KEY.match(key) else _value(key)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        # What JSON escapes, TOML escapes alike; DEL is the exception.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return f"[{', '.join(map(_value, value))}]"
