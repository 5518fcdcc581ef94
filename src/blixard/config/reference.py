"""Write CONFIGURATION.md and config/default.toml from the settings themselves.

    python -m blixard.config.reference > CONFIGURATION.md
    python -m blixard.config.reference --toml > config/default.toml

`make reference` runs both; a test fails when either file is stale.
"""

from __future__ import annotations

import argparse
import textwrap

from blixard.config.schema import SettingKey, all_keys, sections

_HEAD = """\
# Configuration

<!-- Made by `make reference` from src/blixard/config/settings.py: change it there. -->

Every setting has a default; none needs to be set. `blixard config show --sources` prints every setting with its value and
where it came from.

## Layers

The layers are merged key by key; a stronger layer replaces single keys, not whole files. Strongest first:

1. options on the command line
2. environment variables `BLIXARD_SECTION__KEY`, for example `BLIXARD_SERVER__PORT=8080` (note the two underscores)
3. the TOML file that the variable `CONFIG_FILE` names
4. `./config.toml`
5. `./config/default.toml`
6. built-in defaults

An unknown section, key or variable, a value that is not understood or out of range, and a `CONFIG_FILE` that does not exist
are errors (exit code 2) that name the file and line, or the variable, and what is allowed. A list or table is one key: the
strongest layer that sets it gives all of it.

## Values

- **duration**: a number of seconds, or a number with one of the units `ms`, `s`, `m`, `h`, `d`: `"500ms"`, `"10s"`, `"7d"`.
- **size**: a number of bytes, or a number with `B`, `KB`, `MB`, `GB`, `TB` (steps of 1000) or `KiB`, `MiB`, `GiB`, `TiB` (steps of 1024).
- **list**: in TOML `["a", "b"]`, in a variable `a,b`.
- **table of labels**: in TOML `{ zone = "a" }`, in a variable `zone=a,disk=fast`.
- **path**: `~` is your home; a relative path starts at the current directory. Empty means none.

## Variables that are not of the form BLIXARD_SECTION__KEY

| Variable | Meaning |
|---|---|
| `CONFIG_FILE` | a TOML file, layer 3 |
| `BLIXARD_SERVER` | short form of `BLIXARD_SERVER__URL` |
| `BLIXARD_TOKEN` | short form of `BLIXARD_SERVER__TOKEN` |
| `BLIXARD_DEBUG` | `1` shows tracebacks of bugs, like `--verbose`; never read as a setting |
| `BLIXARD_JOB_ID`, `BLIXARD_ATTEMPT`, `BLIXARD_NAMESPACE` | set for every job; never read as settings |
| `BLIXARD_CACHE` | where `make` keeps its virtual environments; never read as a setting |
"""
_TOML_HEAD = """\
# Blixard's settings with their defaults. Made by `make reference` from src/blixard/config/settings.py.
#
# To change one, put it into ./config.toml, into a file that CONFIG_FILE names, or into a variable
# BLIXARD_SECTION__KEY; a stronger layer replaces single keys. CONFIGURATION.md explains layers, units and every key.
"""


def configuration_page() -> str:
    """Return the text of CONFIGURATION.md."""
    parts = [_HEAD]
    for section, model in sections().items():
        rows = [_row(setting) for setting in _keys_of(section)]
        table = ["| Key | Default | Variable | Allowed | Meaning |", "|---|---|---|---|---|", *rows]
        parts.append("\n".join([f"## [{section}]", "", _one_line(model.__doc__), "", *table, ""]))
    return "\n".join(parts)


def default_toml() -> str:
    """Return the text of config/default.toml: every key with its default. What the machine decides is commented out."""
    parts = [_TOML_HEAD]
    for section, model in sections().items():
        lines = [f"# {_one_line(model.__doc__)}", f"[{section}]"]
        for setting in _keys_of(section):
            lines += [
                *textwrap.wrap(setting.description, 110, initial_indent="# ", subsequent_indent="# "),
                _assignment(setting),
            ]
        parts.append("\n".join([*lines, ""]))
    return "\n".join(parts)


def _keys_of(section: str) -> list[SettingKey]:
    return [setting for setting in all_keys().values() if setting.section == section]


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())


def _row(setting: SettingKey) -> str:
    default = (
        "the platform's user data directory" if setting.default_by_machine else f"`{setting.show(setting.default)}`"
    )
    allowed = setting.kind.describe().replace("|", "\\|")
    return f"| `{setting.name}` | {default} | `{setting.variable}` | {allowed} | {setting.description} |"


def _assignment(setting: SettingKey) -> str:
    if setting.default_by_machine:
        return f'# {setting.name} = "~/.local/share/blixard"'
    return f"{setting.name} = {setting.show(setting.default)}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Write CONFIGURATION.md, or with --toml config/default.toml.")
    parser.add_argument("--toml", action="store_true")
    text = default_toml() if parser.parse_args().toml else configuration_page()
    print(text, end="")


if __name__ == "__main__":
    main()
