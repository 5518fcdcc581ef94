"""The layers a setting can come from: files, environment variables, the command line."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from blixard.config.kinds import did_you_mean
from blixard.config.schema import FOREIGN_VARIABLES, PREFIX, SHORT_FORMS, all_keys, sections
from blixard.config.toml_lines import find_lines
from blixard.errors import ConfigError

MAX_FILE_BYTES = 1024 * 1024


@dataclasses.dataclass(frozen=True)
class Entry:
    """One value that a layer gives. ``source`` is ``config.toml:3``, a variable's name or ``command line``."""

    key: str
    value: object
    source: str


@dataclasses.dataclass(frozen=True)
class Layer:
    """What one source says, and what is wrong with it, each complaint naming its place."""

    entries: tuple[Entry, ...] = ()
    problems: tuple[str, ...] = ()


def read_layers(overrides: Mapping[str, object], environment: Mapping[str, str], directory: Path) -> list[Layer]:
    """Return all layers, weakest first. Raises ``ConfigError`` for a file that cannot be read as TOML."""
    files = [directory / "config" / "default.toml", directory / "config.toml"]
    layers = [read_file(path, directory) for path in files if path.exists()]
    if named := environment.get("CONFIG_FILE", "").strip():
        layers.append(_read_named_file(directory / Path(named).expanduser(), directory))
    return [*layers, read_environment(environment), read_overrides(overrides)]


def _read_named_file(path: Path, directory: Path) -> Layer:
    if not path.exists():
        raise ConfigError(
            f"CONFIG_FILE names {path}, which does not exist",
            hint="create the file, correct the path, or unset CONFIG_FILE",
        )
    return read_file(path, directory)


def read_file(path: Path, directory: Path) -> Layer:
    """Return what a TOML file sets; its name in messages is relative to ``directory`` where possible."""
    shown = str(path.relative_to(directory)) if path.is_relative_to(directory) else str(path)
    text = _read_text(path, shown)
    try:
        document = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"{shown} is not valid TOML: {error}", hint="correct the line that is named") from error
    return _read_document(document, shown, find_lines(text))


def _read_text(path: Path, shown: str) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        text = data.decode()
    except OSError as error:
        raise ConfigError(
            f"{shown} cannot be read: {error.strerror}", hint="check the file and its permissions"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{shown} is not UTF-8 text (byte {error.start})", hint="save it as UTF-8") from error
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"{shown} is larger than {MAX_FILE_BYTES} bytes", hint="is it really a configuration file?")
    return text


def _read_document(document: Mapping[str, object], shown: str, lines: Mapping[tuple[str, ...], int]) -> Layer:
    entries, problems = [], []
    for section, table in document.items():
        where = f"{shown}:{lines[section,]}"
        if section not in sections():
            problems.append(f"{where}: there is no section {section!r}{_nearest_section(section)}")
        elif not isinstance(table, dict):
            problems.append(f"{where}: {section!r} is a section; write [{section}] and its keys below")
        else:
            for name, value in table.items():
                where = f"{shown}:{lines[section, name]}"
                if (key := f"{section}.{name}") in all_keys():
                    entries.append(Entry(key, value, where))
                else:
                    problems.append(f"{where}: {_unknown_key(section, name)}")
    return Layer(tuple(entries), tuple(problems))


def _nearest_section(wrong: str) -> str:
    holders = [section for section, model in sections().items() if wrong in model.model_fields]
    if holders:
        return f"; did you mean the key {wrong!r} in [{holders[0]}]?"
    return did_you_mean(wrong, sections()) or f"; sections are {', '.join(sections())}"


def _unknown_key(section: str, name: str) -> str:
    names = list(sections()[section].model_fields)
    near = did_you_mean(name, names) or f"; it has {', '.join(names)}"
    return f"there is no key {name!r} in [{section}]{near}"


def read_environment(environment: Mapping[str, str]) -> Layer:
    """Return what ``BLIXARD_SECTION__KEY`` variables and the short forms set."""
    by_variable = {setting.variable: setting.key for setting in all_keys().values()} | dict(SHORT_FORMS)
    ours = sorted(
        name
        for name in environment
        if (name.startswith(PREFIX) or name in SHORT_FORMS) and name not in FOREIGN_VARIABLES
    )
    entries = [Entry(by_variable[name], environment[name], name) for name in ours if name in by_variable]
    unknown = [name for name in ours if name not in by_variable]
    problems = [*_unknown_variables(unknown, by_variable), *_contradictions(entries)]
    return Layer(tuple(entries), tuple(problems))


def _unknown_variables(unknown: Iterable[str], known: Iterable[str]) -> Iterator[str]:
    """Complain of ``BLIXARD_X__Y`` always, of other names only when they look like a slip: they may be somebody else's."""
    for name in unknown:
        near = did_you_mean(name, known)
        if "__" in name:
            yield f"{name}: there is no such setting{near or '; CONFIGURATION.md lists them all'}"
        elif did_you_mean(name, known, cutoff=0.9):
            yield f"{name}: there is no such setting{near}"


def _contradictions(entries: Iterable[Entry]) -> Iterator[str]:
    seen: dict[str, Entry] = {}
    for entry in entries:
        other = seen.setdefault(entry.key, entry)
        if other.value != entry.value:
            yield f"{other.source} and {entry.source} both set {entry.key}, to different values; unset one"


def read_overrides(overrides: Mapping[str, object]) -> Layer:
    """Return what the command line sets: keys ``section.name``; None means not given."""
    given = {key: value for key, value in overrides.items() if value is not None}
    entries = [Entry(key, value, "command line") for key, value in given.items() if key in all_keys()]
    problems = [
        f"command line: there is no setting {key!r}{did_you_mean(key, all_keys())}"
        for key in given
        if key not in all_keys()
    ]
    return Layer(tuple(entries), tuple(problems))
