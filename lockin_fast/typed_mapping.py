"""Between plain mappings (as YAML gives them) and frozen dataclasses, with errors that name the dotted key."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

EXPECTED = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}


class ConfigError(ValueError):
    """A configuration that cannot be used as it stands; the message is one line that says what to change."""


def build(cls: type, values: Any, *, folder: Path, key: str = "", root: type | None = None) -> Any:
    """Return `cls(**values)` for the dataclass `cls`, converting every value to its annotated type.

    Supports nested dataclasses, bool, int, float, str, Path, Literal, `X | None`, `tuple[X, ...]` and
    mappings. A relative path is resolved against `folder`. `key` is where `values` sits in the file, `root` the
    dataclass of the whole file, among whose keys the nearest is looked for when one is unknown.
    Raises ConfigError naming the dotted key, what was got and what was expected.
    """
    root = root or cls
    if not isinstance(values, Mapping):
        raise ConfigError(f"{key or 'configuration'}: expected a section of keys and values, got {values!r}")
    hints = typing.get_type_hints(cls)
    known = [field.name for field in dataclasses.fields(cls) if not field.metadata.get("hidden")]
    arguments = {}
    for name, value in values.items():
        dotted = f"{key}.{name}" if key else str(name)
        if name not in known:
            raise ConfigError(f"{dotted}: unknown key{_nearest(dotted, key, known, root)}")
        arguments[name] = _convert(hints[name], value, folder, dotted, root)
    try:
        return cls(**arguments)
    except (TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        line = str(error)
        raise ConfigError(line if line.startswith(f"{key}.") else f"{key or 'configuration'}: {line}") from error


def leaves(value: Any, key: str = "") -> typing.Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) for every setting below the dataclass instance `value`, hidden fields left out.

    Settings below the second of a list of dataclasses are section[1].name; the list itself is a leaf when it is empty.
    """
    for field in dataclasses.fields(value):
        if field.metadata.get("hidden"):
            continue
        dotted, child = f"{key}.{field.name}" if key else field.name, getattr(value, field.name)
        if dataclasses.is_dataclass(child):
            yield from leaves(child, dotted)
        elif isinstance(child, tuple) and any(map(dataclasses.is_dataclass, child)):
            for i, item in enumerate(child):
                yield from leaves(item, f"{dotted}[{i}]")
        else:
            yield dotted, child


def plain(value: Any) -> Any:
    """The value in types that YAML and JSON know: dataclasses, mappings as dicts, tuples as lists, paths as str."""
    if dataclasses.is_dataclass(value):
        return {
            f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value) if not f.metadata.get("hidden")
        }
    if isinstance(value, Mapping):
        return {str(name): plain(child) for name, child in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain(child) for child in value]
    return str(value) if isinstance(value, (Path, str)) else value


def _convert(hint: Any, value: Any, folder: Path, key: str, root: type) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(arguments, value, folder, key, root)
    if origin is typing.Literal:
        if value not in arguments:
            raise ConfigError(f"{key}: expected one of {', '.join(map(str, arguments))}, got {value!r}")
        return value
    if origin in (tuple, list, Sequence):
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{key}: expected a list, got {value!r}")
        return tuple(_convert(arguments[0], item, folder, f"{key}[{i}]", root) for i, item in enumerate(value))
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{key}: expected names and values, got {value!r}")
        return {str(name): _convert(arguments[1], item, folder, f"{key}.{name}", root) for name, item in value.items()}
    if dataclasses.is_dataclass(hint):
        return build(hint, {} if value is None else value, folder=folder, key=key, root=root)
    return value if hint is Any else _scalar(hint, value, folder, key)


def _convert_union(choices: tuple, value: Any, folder: Path, key: str, root: type) -> Any:
    if value is None and types.NoneType in choices:
        return None
    errors = []
    for choice in choices:
        if choice is types.NoneType:
            continue
        try:
            return _convert(choice, value, folder, key, root)
        except ConfigError as error:
            errors.append(error)
    raise errors[-1]


def _scalar(hint: type, value: Any, folder: Path, key: str) -> Any:
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-4 as text
        except ValueError:
            pass
    elif hint is Path and isinstance(value, (str, Path)) and str(value):
        return Path(folder, Path(value).expanduser()).resolve()
    elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise ConfigError(f"{key}: expected {EXPECTED.get(hint, hint)}, got {value!r} ({type(value).__name__})")


def _nearest(dotted: str, section: str, siblings: list[str], root: type) -> str:
    name = dotted.rpartition(".")[2]
    close = [f"{section}.{near}" if section else near for near in difflib.get_close_matches(name, siblings, 1)]
    if not close:  # the right name, or nearly, in the wrong section
        every = {key.rpartition(".")[2]: key for key in reversed(list(_keys(root)))}
        close = [every[near] for near in difflib.get_close_matches(name, every, 1, cutoff=0.8)]
    return f"; did you mean {close[0]}?" if close else f"; known here: {', '.join(siblings)}"


def _keys(cls: type, key: str = "") -> typing.Iterator[str]:
    for field in dataclasses.fields(cls):
        if field.metadata.get("hidden"):
            continue
        dotted, hint = f"{key}.{field.name}" if key else field.name, typing.get_type_hints(cls)[field.name]
        yield dotted
        if dataclasses.is_dataclass(hint):
            yield from _keys(hint, dotted)
