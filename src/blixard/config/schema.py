"""The list of all settings, read off the models in settings.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cache

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from blixard.config.kinds import Kind, Text
from blixard.config.settings import Settings, default_data_dir

PREFIX = "BLIXARD_"
SHORT_FORMS: Mapping[str, str] = {
    "BLIXARD_SERVER": "server.url",
    "BLIXARD_TOKEN": "server.token",
    "SKIP_VM_MANAGER": "vm.skip",
}
"""Variables that set a key without naming its section."""
FOREIGN_VARIABLES = frozenset(
    {
        "BLIXARD_JOB_ID",  # told to every job; a job may itself run blixard
        "BLIXARD_ATTEMPT",
        "BLIXARD_NAMESPACE",
        "BLIXARD_CACHE",  # the Makefile's
        "BLIXARD_DEBUG",  # the command line's
    }
)
"""Variables of ours that are not settings."""
MASK = "********"


@dataclasses.dataclass(frozen=True)
class SettingKey:
    """One setting. ``default`` is None where the machine decides it (``default_by_machine``)."""

    section: str
    name: str
    kind: Kind[object]
    default: object
    description: str
    default_by_machine: bool = False

    @property
    def key(self) -> str:
        return f"{self.section}.{self.name}"

    @property
    def variable(self) -> str:
        return f"{PREFIX}{self.section.upper()}__{self.name.upper()}"

    @property
    def secret(self) -> bool:
        return isinstance(self.kind, Text) and self.kind.secret

    def show(self, value: object) -> str:
        """Return ``value`` as a TOML literal, a secret one masked."""
        return self.kind.show(MASK if self.secret and value else value)


@cache
def all_keys() -> Mapping[str, SettingKey]:
    """Return every setting by its key ``section.name``, in the order of settings.py."""
    found = (
        _setting_key(section, name, field)
        for section, model in sections().items()
        for name, field in model.model_fields.items()
    )
    return {key.key: key for key in found}


@cache
def sections() -> Mapping[str, type[BaseModel]]:
    """Return the model of every section by its name."""
    models = ((name, field.annotation) for name, field in Settings.model_fields.items())
    return {name: model for name, model in models if isinstance(model, type) and issubclass(model, BaseModel)}


def _setting_key(section: str, name: str, field: FieldInfo) -> SettingKey:
    kind = next(item for item in field.metadata if isinstance(item, Kind))
    by_machine = field.default_factory is default_data_dir
    default = None if by_machine else field.get_default(call_default_factory=True, validated_data={})
    return SettingKey(section, name, kind, default, field.description or "", by_machine)
