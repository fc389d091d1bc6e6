"""Configurations are frozen dataclasses; this module edits them from `key=value`, and reads and writes YAML.

An unknown key is an error that names the nearest field. Field types supported: bool, int, float, str, Path,
tuples of those, `X | None`, Literal, and nested dataclasses (`optimiser.learning_rate=1e-4`). Also here: the
option --shard, which two commands share.
"""

import dataclasses
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from hilum.core.errors import ConfigError, UnknownNameError
from hilum.core.files import write_text

Config = TypeVar("Config")


def override(config: Config, assignments: Iterable[str]) -> Config:
    """Return a copy of a dataclass with `key=value` texts applied, all at once; values are read as YAML.

    Raises:
        ConfigError: not of the form key=value, or a value of the wrong type.
        UnknownNameError: a key that the configuration does not have.
    """
    changes = {}
    for text in assignments:
        key, separator, value = text.partition("=")
        if not separator or not key:
            raise ConfigError(f"Expected key=value, found {text!r}.")
        try:
            parsed = yaml.safe_load(value) if value else ""
        except yaml.YAMLError as error:
            raise ConfigError(f"The value in {text!r} is not valid YAML: {error}.") from error
        changes[tuple(key.split("."))] = parsed
    return _replace(config, changes)


def _replace(config: Any, changes: Mapping[tuple[str, ...], Any], where: str = "") -> Any:
    """Apply all changes at once: some values fit only together."""
    hints = get_type_hints(type(config))
    names = {field.name for field in dataclasses.fields(config)}
    replaced = {}
    for name in dict.fromkeys(path[0] for path in changes):
        if name not in names:
            raise UnknownNameError(f"setting of {type(config).__name__}", name, names)
        inner = {path[1:]: value for path, value in changes.items() if path[0] == name}
        key, value = f"{where}{name}", getattr(config, name)
        if () in inner:
            value = _convert(inner.pop(()), hints[name], key)
        if inner:
            if not dataclasses.is_dataclass(value):
                raise ConfigError(f"{'.'.join((key, *next(iter(inner))))!r}: {name!r} has no settings of its own.")
            value = _replace(value, inner, f"{key}.")
        replaced[name] = value
    try:
        return dataclasses.replace(config, **replaced)
    except ValueError as error:  # raised by a __post_init__ that checks ranges
        raise ConfigError(str(error)) from error


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as plain dicts, lists, numbers and texts (paths become texts)."""
    return _plain(dataclasses.asdict(config))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def from_dict(kind: type[Config], values: Mapping[str, Any], where: str = "") -> Config:
    """Build a dataclass of type `kind` from plain values; missing keys take their defaults."""
    hints = get_type_hints(kind)
    names = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    arguments = {}
    for key, value in values.items():
        if key not in names:
            raise UnknownNameError(f"setting of {kind.__name__}", key, names)
        arguments[key] = _convert(value, hints[key], f"{where}{key}")
    try:
        return kind(**arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{kind.__name__}: {error}") from error


def write_yaml(path: Path, config: Any) -> None:
    """Write a dataclass as YAML that `read_yaml` gives back unchanged."""
    write_text(path, yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True))


def read_yaml(kind: type[Config], path: Path) -> Config:
    """Read a dataclass of type `kind` from a YAML file.

    Raises:
        ConfigError: no such file, not YAML, or not a mapping.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as a configuration: {error}.") from error
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path}: expected a mapping of settings, found {type(values).__name__}.")
    return from_dict(kind, _by_text(values))


def _by_text(values: Mapping[Any, Any]) -> dict[str, Any]:
    """Keys of YAML as text: 1 and on are no name of a setting, and are refused as such."""
    return {str(key): value for key, value in values.items()}


def parse_shard(text: str | None) -> tuple[int, int]:
    """Read the option --shard: "i/n" is job i of n, counted from 0; None is the only job, (0, 1).

    Raises:
        ConfigError: not of that form, or no job of that number.
    """
    job, slash, jobs = ("0", "/", "1") if text is None else text.partition("/")
    if not slash or not job.isdecimal() or not jobs.isdecimal() or not int(job) < int(jobs):
        raise ConfigError(f"--shard: expected i/n with 0 <= i < n, as in 0/8, found {text!r}.")
    return int(job), int(jobs)


def _convert(value: Any, hint: Any, key: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _convert(value, next(kind for kind in arguments if kind is not type(None)), key)
    if origin is Literal:
        said = ("on" if value else "off") if isinstance(value, bool) else value  # YAML 1.1 reads on and off so
        if said not in arguments:
            raise UnknownNameError(f"value of {key}", str(value), map(str, arguments))
        return said
    if origin is tuple:
        items = value if isinstance(value, list | tuple) else [value]
        if arguments[-1] is Ellipsis:
            return tuple(_convert(item, arguments[0], key) for item in items)
        if len(items) != len(arguments):
            raise ConfigError(f"{key}: expected {len(arguments)} values, found {len(items)}.")
        return tuple(_convert(item, kind, key) for item, kind in zip(items, arguments, strict=True))
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if isinstance(value, Mapping):
            return from_dict(hint, _by_text(value), f"{key}.")
        raise ConfigError(f"{key}: expected a group of settings, found {value!r}.")
    return _convert_scalar(value, hint, key)


def _convert_scalar(value: Any, hint: Any, key: str) -> Any:
    if hint is Any:
        return value
    if hint is float and not isinstance(value, bool):
        try:  # YAML 1.1 reads "1e-4" as text
            return float(value)
        except (TypeError, ValueError):
            pass
    elif hint in (int, bool) and type(value) is hint:
        return value
    elif hint is str and isinstance(value, str | int | float):
        return str(value)
    elif hint is Path and isinstance(value, str | Path):
        return Path(value)
    raise ConfigError(f"{key}: expected {getattr(hint, '__name__', hint)}, found {value!r}.")
