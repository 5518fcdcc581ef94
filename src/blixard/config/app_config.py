"""All layers merged key by key into one checked, immutable ``Settings``, with the source of every value."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from blixard.config.layers import Entry, read_layers
from blixard.config.schema import all_keys
from blixard.config.settings import Settings
from blixard.errors import ConfigError

BUILT_IN = "built-in"
MAX_PROBLEMS = 20
"""Problems listed in one error."""


@dataclasses.dataclass(frozen=True)
class SettingSource:
    """One setting as it stands: ``value`` is a TOML literal, masked if secret."""

    key: str
    value: str
    source: str


@dataclasses.dataclass(frozen=True)
class AppConfig:
    """The settings of this process. ``origins`` names for every key that is not built-in the place that set it."""

    settings: Settings
    origins: Mapping[str, str]

    @classmethod
    def load_with_layers(
        cls,
        overrides: Mapping[str, object] | None = None,
        *,
        environment: Mapping[str, str] | None = None,
        directory: Path | None = None,
    ) -> AppConfig:
        """Merge all layers key by key and check the result.

        Strongest first: ``overrides`` (keys ``section.name``; None means not given), variables ``BLIXARD_SECTION__KEY``,
        the file that ``CONFIG_FILE`` names, ``./config.toml``, ``./config/default.toml``, built-in defaults.
        ``environment`` is ``os.environ`` and ``directory`` the current one unless given. Raises ``ConfigError`` that lists every
        wrong setting with its file and line, or its variable, and what is allowed.
        """
        here = Path.cwd() if directory is None else directory
        layers = read_layers(overrides or {}, os.environ if environment is None else environment, here)
        merged = {entry.key: entry for layer in layers for entry in layer.entries}
        problems = [problem for layer in layers for problem in layer.problems]
        settings, wrong = _check(merged)
        if settings is None or problems:
            raise _config_error([*problems, *wrong])
        return cls(settings, {key: entry.source for key, entry in merged.items()})

    def sources(self) -> list[SettingSource]:
        """Return every setting in the order of CONFIGURATION.md, with its value and where it came from."""
        return [
            SettingSource(key, setting.show(self._value(key)), self.origins.get(key, BUILT_IN))
            for key, setting in all_keys().items()
        ]

    def _value(self, key: str) -> object:
        section, name = key.split(".")
        return getattr(getattr(self.settings, section), name)


def describe_sources(config: AppConfig) -> list[SettingSource]:
    """Return what `blixard config show --sources` prints."""
    return config.sources()


def _check(merged: Mapping[str, Entry]) -> tuple[Settings | None, list[str]]:
    tree: dict[str, dict[str, object]] = {}
    for key, entry in merged.items():
        section, name = key.split(".")
        tree.setdefault(section, {})[name] = entry.value
    try:
        return Settings.model_validate(tree), []
    except ValidationError as error:
        return None, [_problem(details, merged) for details in error.errors(include_url=False)]


def _problem(details: ErrorDetails, merged: Mapping[str, Entry]) -> str:
    key = ".".join(str(part) for part in details["loc"][:2])
    message = str(details.get("ctx", {}).get("error", details["msg"]))
    if key in merged:
        return f"{merged[key].source}: {key}: {message}"
    # The rule is about several keys of a section: name the places of all that are set.
    places = sorted({entry.source for name, entry in merged.items() if name.startswith(f"{key}.")})
    return f"{', '.join(places)}: {message}"


def _config_error(problems: Iterable[str]) -> ConfigError:
    listed = list(dict.fromkeys(problems))
    hint = "CONFIGURATION.md describes every setting; `blixard config show --sources` shows where each value comes from"
    if len(listed) == 1:
        return ConfigError(listed[0], hint=hint)
    lines = [f"  {problem}" for problem in listed[:MAX_PROBLEMS]]
    return ConfigError("\n".join([f"{len(listed)} settings are wrong:", *lines]), hint=hint)
