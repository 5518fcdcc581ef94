from __future__ import annotations

import tomllib
from pathlib import Path

from blixard.config import AppConfig, Settings
from blixard.config.reference import configuration_page, default_toml
from blixard.config.schema import all_keys

ROOT = Path(__file__).parents[3]


def test_the_configuration_page_is_up_to_date() -> None:
    assert (ROOT / "CONFIGURATION.md").read_text() == configuration_page(), "run `make reference`"


def test_the_default_file_is_up_to_date() -> None:
    assert (ROOT / "config/default.toml").read_text() == default_toml(), "run `make reference`"


def test_the_default_file_sets_every_key_to_its_default() -> None:
    config = AppConfig.load_with_layers(
        environment={"CONFIG_FILE": str(ROOT / "config/default.toml")}, directory=Path("/")
    )
    assert config.settings == Settings()
    assert set(config.origins) == set(all_keys()) - {"storage.data_dir"}


def test_the_production_example_loads() -> None:
    path = ROOT / "config/example-production.toml"
    config = AppConfig.load_with_layers(environment={"CONFIG_FILE": str(path)}, directory=Path("/"))
    written = {f"{section}.{name}" for section, table in tomllib.loads(path.read_text()).items() for name in table}
    assert set(config.origins) == written
    assert config.settings.server.host == "0.0.0.0"


def test_every_key_is_described_and_listed() -> None:
    page = configuration_page()
    for setting in all_keys().values():
        assert setting.description.endswith("."), setting.key
        assert f"`{setting.variable}`" in page


def test_the_readme_of_the_folder_names_every_layer() -> None:
    text = (ROOT / "config/README.txt").read_text()
    for word in (
        "BLIXARD_SECTION__KEY",
        "CONFIG_FILE",
        "./config.toml",
        "./config/default.toml",
        "BLIXARD_SERVER",
        "BLIXARD_TOKEN",
    ):
        assert word in text
