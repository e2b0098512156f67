"""Configuration: a TOML file, then `SLUICE_...` environment variables, validated once, frozen, and passed inward.

Environment: `SLUICE_` + the key's path in capitals, levels joined by two underscores: `SLUICE_MQTT__HOST=broker` sets
`host` of `[mqtt]`. A value that begins with `[` or `{` is read as TOML. An unknown key, in the file or in the
environment, is an error that names the nearest known one: a misspelt limit must not silently be the default.
"""

import difflib
import os
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

from sluice.errors import ConfigError

PREFIX: Final = "SLUICE_"
# Variables of this prefix that are not configuration keys.
RESERVED: Final = frozenset({"SLUICE_CACHE", "SLUICE_CONFIG", "SLUICE_TARGET"})

# Kubernetes puts these into every pod beside a service called "sluice".
_KUBERNETES: Final = ("SLUICE_SERVICE_", "SLUICE_PORT")


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every configuration section: frozen, keyword-only, strict about unknown keys."""


_S = TypeVar("_S", bound=Section)


def load(
    kind: type[_S],
    path: Path | None = None,
    environ: Mapping[str, str] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> _S:
    """Reads a configuration: the file, then the environment, then `overrides` (from flags), later ones winning.

    Args:
        kind: the section that describes the whole file.
        path: a TOML file, or None for defaults.
        environ: `os.environ` when None.
        overrides: nested mapping in the file's shape.

    Raises:
        ConfigError: naming file or variable, key, and the nearest known key.
    """
    tree = _read(path) if path else {}
    source = str(path) if path else "configuration"
    _check_keys(tree, kind, source)
    merged = _merge(tree, _from_environment(os.environ if environ is None else environ, kind))
    if overrides:
        _check_keys(overrides, kind, "flags")
        merged = _merge(merged, overrides)
    try:
        return msgspec.convert(merged, kind, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{source}: {_plain(str(error))}") from error


def reference(kind: type[Section], prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """Every key of a configuration as `(key, type, default, description)`, for the documentation."""
    info = msgspec.inspect.type_info(kind)
    assert isinstance(info, msgspec.inspect.StructType)
    for field in info.fields:
        name = f"{prefix}{field.encode_name}"
        inner, description = _unwrap(field.type)
        if isinstance(inner, msgspec.inspect.StructType) and issubclass(inner.cls, Section):
            yield from reference(inner.cls, f"{name}.")
            continue
        default = "" if field.default is msgspec.NODEFAULT else repr(field.default)
        if field.default_factory is not msgspec.NODEFAULT:
            default = repr(field.default_factory())
        yield name, _type_name(inner), default, description


def _type_name(kind: msgspec.inspect.Type) -> str:
    """How a person would write the type down."""
    inner, _ = _unwrap(kind)
    match inner:
        case msgspec.inspect.LiteralType(values=values):
            return " or ".join(repr(value) for value in values)
        case msgspec.inspect.UnionType(types=types):
            named = [t for t in types if not isinstance(t, msgspec.inspect.NoneType)]
            return " or ".join(dict.fromkeys(_type_name(t) for t in named))
        case msgspec.inspect.VarTupleType(item_type=item) | msgspec.inspect.ListType(item_type=item):
            return f"list of {_type_name(item)}"
        case msgspec.inspect.DictType(key_type=key, value_type=value):
            return f"table of {_type_name(key)} = {_type_name(value)}"
        case msgspec.inspect.StructType():
            return "table"
        case _:
            return type(inner).__name__.removesuffix("Type").lower()


def read_secret(path: str | None, what: str) -> str | None:
    """Reads a secret (password, key) from a file, without its final newline; None stays None.

    Raises:
        ConfigError: naming the file, when it cannot be read.
    """
    if path is None:
        return None
    try:
        return Path(path).read_text(encoding="utf-8").rstrip("\r\n")
    except OSError as error:
        raise ConfigError(f"{what}: cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{what}: {path} is not UTF-8 text") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        merged[key] = _merge(old, value) if both else value  # type: ignore[arg-type]
    return merged


def _from_environment(environ: Mapping[str, str], kind: type[Section]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, raw in sorted(environ.items()):
        if not name.startswith(PREFIX) or name in RESERVED or name.startswith(_KUBERNETES):
            continue
        *parents, leaf = name.removeprefix(PREFIX).lower().split("__")
        value: Any = raw
        if raw[:1] in {"[", "{"}:
            try:
                value = tomllib.loads(f"value = {raw}")["value"]
            except tomllib.TOMLDecodeError as error:
                raise ConfigError(f"{name}: not a valid TOML value: {error}") from error
        single: dict[str, Any] = {leaf: value}
        for parent in reversed(parents):
            single = {parent: single}
        _check_keys(single, kind, f"environment variable {name}")
        tree = _merge(tree, single)
    return tree


def _check_keys(tree: Mapping[str, Any], kind: type[msgspec.Struct], source: str, prefix: str = "") -> None:
    """Raises ConfigError for the first key of `tree` that `kind` does not know."""
    info = msgspec.inspect.type_info(kind)
    assert isinstance(info, msgspec.inspect.StructType)
    fields = {field.encode_name: field.type for field in info.fields}
    tag = {info.tag_field} if info.tag_field else set()
    for key, value in tree.items():
        if key in tag:
            continue
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1, cutoff=0.5)
            hint = f"; did you mean '{prefix}{near[0]}'?" if near else f"; known keys: {', '.join(sorted(fields))}"
            raise ConfigError(f"{source}: unknown key '{prefix}{key}'{hint}")
        _check_value(value, fields[key], source, f"{prefix}{key}")


def _check_value(value: Any, kind: msgspec.inspect.Type, source: str, path: str) -> None:
    inner, _ = _unwrap(kind)
    words = inner.values if isinstance(inner, msgspec.inspect.LiteralType) else ()
    if isinstance(value, str) and words and value not in words and all(isinstance(word, str) for word in words):
        known = ", ".join(repr(word) for word in words)
        raise ConfigError(f"{source}: key '{path}': {value!r} is not one of {known}")
    if isinstance(value, list) and isinstance(inner, msgspec.inspect.ListType | msgspec.inspect.VarTupleType):
        for i, item in enumerate(value):
            _check_value(item, inner.item_type, source, f"{path}[{i}]")
    if not isinstance(value, Mapping):
        return
    options = inner.types if isinstance(inner, msgspec.inspect.UnionType) else (inner,)
    for table in options:
        if isinstance(table, msgspec.inspect.DictType):
            for key, item in value.items():
                _check_value(item, table.value_type, source, f"{path}.{key}")
    structs = [t for t in options if isinstance(t, msgspec.inspect.StructType)]
    for struct in structs:
        if len(structs) == 1 or value.get(struct.tag_field or "") == struct.tag:
            _check_keys(value, struct.cls, source, f"{path}.")


def _unwrap(kind: msgspec.inspect.Type) -> tuple[msgspec.inspect.Type, str]:
    """The type below its metadata, and its description."""
    description = ""
    while isinstance(kind, msgspec.inspect.Metadata):
        description = (kind.extra_json_schema or {}).get("description", description)
        kind = kind.type
    return kind, description


def _plain(message: str) -> str:
    """The message of msgspec with the key's path first."""
    text, _, path = message.partition(" - at `$")
    return f"key '{path.rstrip('`').lstrip('.')}': {text}" if path else text
