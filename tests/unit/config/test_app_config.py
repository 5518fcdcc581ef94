from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blixard.config import AppConfig, describe_sources
from blixard.config.schema import MASK, all_keys
from blixard.config.settings import ServerSettings, Settings
from blixard.errors import ConfigError
from tests.unit.config.samples import SAMPLES, TOGETHER

LAYERS = ("config/default.toml", "config.toml", "other/named.toml", "environment", "command line")


def load(directory: Path, **variables: str) -> AppConfig:
    return AppConfig.load_with_layers(environment=variables, directory=directory)


def load_overridden(directory: Path, overrides: dict[str, object], **variables: str) -> AppConfig:
    return AppConfig.load_with_layers(overrides, environment=variables, directory=directory)


def value_of(config: AppConfig, key: str) -> object:
    section, name = key.split(".")
    return getattr(getattr(config.settings, section), name)


def source_of(config: AppConfig, key: str) -> str:
    return next(source.source for source in config.sources() if source.key == key)


def assign(key: str, toml: str) -> str:
    section, name = key.split(".")
    return f"[{section}]\n{name} = {toml}\n"


def complaint(directory: Path, text: str, **variables: str) -> str:
    (directory / "config.toml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(directory, **variables)
    assert caught.value.hint
    return str(caught.value)


def test_the_samples_cover_every_setting() -> None:
    assert list(SAMPLES) == list(all_keys())


@pytest.mark.parametrize("key", SAMPLES)
def test_every_key_can_be_set_in_a_file(key: str, tmp_path: Path) -> None:
    toml, _, expected = SAMPLES[key]
    text = assign(key, toml)
    if other := TOGETHER.get(key):
        text += f"{other.split('.')[1]} = {SAMPLES[other][0]}\n"
    (tmp_path / "config.toml").write_text(text)
    config = load(tmp_path)
    assert value_of(config, key) == expected != all_keys()[key].default
    assert source_of(config, key) == "config.toml:2"


@pytest.mark.parametrize("key", SAMPLES)
def test_every_key_can_be_set_by_a_variable(key: str, tmp_path: Path) -> None:
    names = [name for name in (key, TOGETHER.get(key)) if name]
    config = load(tmp_path, **{all_keys()[name].variable: SAMPLES[name][1] for name in names})
    assert value_of(config, key) == SAMPLES[key][2]
    assert source_of(config, key) == all_keys()[key].variable


@pytest.mark.parametrize("key", SAMPLES)
def test_what_is_shown_of_a_setting_sets_it_again(key: str, tmp_path: Path) -> None:
    setting, expected = all_keys()[key], SAMPLES[key][2]
    if setting.secret:
        assert setting.show(expected) == f'"{MASK}"'
    else:
        (tmp_path / "config.toml").write_text(assign(key, setting.show(expected)))
        names = {other: SAMPLES[other][2] for other in [TOGETHER.get(key)] if other}
        assert value_of(load_overridden(tmp_path, dict(names)), key) == expected


def test_without_any_layer_the_built_in_defaults_hold(tmp_path: Path) -> None:
    config = load(tmp_path)
    assert config.settings == Settings()
    assert {source.source for source in describe_sources(config)} == {"built-in"}
    assert config.settings.storage.data_dir.is_absolute()


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["server.port", "maintenance.batch", "worker.slots"]), st.sets(st.sampled_from(LAYERS))
    )
)
def test_layers_merge_key_by_key_and_the_strongest_wins(
    tmp_path_factory: pytest.TempPathFactory, placed: dict[str, set[str]]
) -> None:
    directory = tmp_path_factory.mktemp("layers")
    numbers = {(key, layer): n for n, (key, layer) in enumerate(itertools.product(placed, LAYERS), 10)}
    for name in LAYERS[:3]:
        text = "".join(assign(key, str(numbers[key, name])) for key, layers in placed.items() if name in layers)
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(text)
    variables = {
        all_keys()[key].variable: str(numbers[key, "environment"]) for key in placed if "environment" in placed[key]
    }
    overrides: dict[str, object] = {k: numbers[k, "command line"] for k in placed if "command line" in placed[k]}
    config = load_overridden(directory, overrides, CONFIG_FILE="other/named.toml", **variables)
    for key, layers in placed.items():
        strongest = max(layers, key=LAYERS.index, default=None)
        expected = numbers[key, strongest] if strongest else all_keys()[key].default
        shown = {None: "built-in", "environment": all_keys()[key].variable}.get(strongest, strongest)
        assert value_of(config, key) == expected
        assert source_of(config, key).split(":")[0] == shown


def test_a_missing_config_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"CONFIG_FILE names .*nowhere\.toml, which does not exist"):
        load(tmp_path, CONFIG_FILE="nowhere.toml")


def test_an_empty_config_file_variable_names_no_file(tmp_path: Path) -> None:
    assert load(tmp_path, CONFIG_FILE="").settings == Settings()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[server]\n\nprot = 1", "config.toml:3: there is no key 'prot' in [server]; did you mean 'port'?"),
        ("[sever]\nport = 1", "config.toml:1: there is no section 'sever'; did you mean 'server'?"),
        ("port = 1", "config.toml:1: there is no section 'port'; did you mean the key 'port' in [server]?"),
        ("# x\nserver = 1", "config.toml:2: 'server' is a section; write [server] and its keys below"),
        ("[qqq]", "sections are server, storage, worker"),
        ("[log]\nqqq = 1", "there is no key 'qqq' in [log]; it has level, format"),
        ("[server]\nport = 70000", "config.toml:2: server.port: 70000 is out of range; 0 to 65535 is allowed"),
        ("[server]\nport = true", "config.toml:2: server.port: True is not a whole number"),
        ("[server]\nport = 1.5", "config.toml:2: server.port: 1.5 is not a whole number"),
        ("[server]\nurl = 'example.org'", "does not start with http:// or https://"),
        ("[log]\nlevel = 'wran'", "config.toml:2: log.level: 'wran' is not one of debug, info, warning, error"),
        ("[worker]\ntypes = ['wasn']", "'wasn' is not one of process, wasm, microvm; did you mean 'wasm'?"),
        ("[worker]\nqueues = ['a', 'a']", "names something twice"),
        ("[worker.labels]\nzone = 3", "config.toml:1: worker.labels: the label 'zone' has a value that is not text"),
        ("[storage]\ncompleted_retention = '7w'", "there is no unit 'w' in '7w'"),
        ("[storage]\ndata_dir = ''", "config.toml:2: storage.data_dir: is empty; a path is needed"),
        ("[leases]\nduration = '10ms'", "'10ms' is out of range; 1s to 1h is allowed"),
        ("[server]\ntls_key = 'k'", "config.toml:2: server.tls_certificate and server.tls_key are needed together"),
        ("[server\n", "config.toml is not valid TOML:"),
    ],
)
def test_a_mistake_in_a_file_names_its_line_and_the_way_out(text: str, message: str, tmp_path: Path) -> None:
    assert message in complaint(tmp_path, text)


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("BLIXARD_SERVER__PROT", "1", "there is no such setting; did you mean 'BLIXARD_SERVER__PORT'?"),
        ("BLIXARD_SERVER_PORT", "1", "there is no such setting; did you mean 'BLIXARD_SERVER__PORT'?"),
        ("BLIXARD_TOKNE", "x", "there is no such setting; did you mean 'BLIXARD_TOKEN'?"),
        ("BLIXARD_QQ__ZZZZZZZZ", "1", "there is no such setting; CONFIGURATION.md lists them all"),
        ("BLIXARD_SERVER__PORT", "", "server.port: '' is not a whole number"),
        ("BLIXARD_SERVER__PORT", "3o20", "server.port: '3o20' is not a whole number"),
        ("BLIXARD_WORKER__LABELS", "zone", "is not a table of labels"),
        ("BLIXARD_WORKER__CPUS", "nan", "'nan' is not a number"),
        ("BLIXARD_SANDBOX__MEMORY", "1GX", "there is no unit 'GX' in '1GX'"),
        ("BLIXARD_SERVER", "localhost:3020", "server.url: 'localhost:3020' does not start with http:// or https://"),
    ],
)
def test_a_mistake_in_a_variable_names_it_and_the_way_out(
    variable: str, value: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, **{variable: value})
    assert str(caught.value).startswith(f"{variable}: ")
    assert message in str(caught.value)


def test_all_mistakes_are_listed_at_once(tmp_path: Path) -> None:
    text = complaint(tmp_path, "[server]\nport = -1\nhots = 'x'\n", BLIXARD_LOG__LEVEL="loud")
    assert text.startswith("3 settings are wrong:\n")
    assert "config.toml:2" in text
    assert "config.toml:3" in text
    assert "BLIXARD_LOG__LEVEL" in text


def test_a_wrong_option_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"command line: server\.port: 99999 is out of range"):
        load_overridden(tmp_path, {"server.port": 99999})
    with pytest.raises(
        ConfigError, match=r"command line: there is no setting 'server\.prot'; did you mean 'server\.port'\?"
    ):
        load_overridden(tmp_path, {"server.prot": 1})


def test_an_option_that_is_not_given_overrides_nothing(tmp_path: Path) -> None:
    config = load_overridden(tmp_path, {"server.port": None}, BLIXARD_SERVER__PORT="1")
    assert config.settings.server.port == 1


def test_short_forms_set_server_and_token(tmp_path: Path) -> None:
    config = load(tmp_path, BLIXARD_SERVER="http://h:1", BLIXARD_TOKEN="blx_1")
    assert (config.settings.server.url, config.settings.server.token) == ("http://h:1", "blx_1")
    assert source_of(config, "server.url") == "BLIXARD_SERVER"


def test_two_variables_for_one_setting_must_agree(tmp_path: Path) -> None:
    load(tmp_path, BLIXARD_SERVER="http://h:1", BLIXARD_SERVER__URL="http://h:1")
    with pytest.raises(ConfigError, match=r"BLIXARD_SERVER and BLIXARD_SERVER__URL both set server\.url"):
        load(tmp_path, BLIXARD_SERVER="http://h:1", BLIXARD_SERVER__URL="http://h:2")


@pytest.mark.parametrize(
    "name",
    ["BLIXARD_JOB_ID", "BLIXARD_ATTEMPT", "BLIXARD_NAMESPACE", "BLIXARD_CACHE", "BLIXARD_DEBUG", "BLIXARD_DEPLOYED_BY"],
)
def test_variables_that_are_not_settings_are_left_alone(name: str, tmp_path: Path) -> None:
    assert load(tmp_path, **{name: "x"}).settings == Settings()


def test_a_secret_is_shown_neither_in_lists_nor_in_errors(tmp_path: Path) -> None:
    config = load(tmp_path, BLIXARD_TOKEN="blx_hush")
    assert "blx_hush" not in repr(config.settings) + str(config.settings) + repr(config.sources())
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, BLIXARD_TOKEN="blx_\thush")
    assert "hush" not in str(caught.value)


def test_paths_are_absolute_and_know_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    config = load(tmp_path, BLIXARD_STORAGE__DATA_DIR="~/x/../y")
    assert config.settings.storage.data_dir == Path("/home/somebody/y")


@pytest.mark.parametrize("content", [b"\xff\xfe", b"#" * (1024 * 1024 + 1)])
def test_a_file_that_is_not_a_configuration_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.toml is (not UTF-8|larger than)"):
        load(tmp_path)


def test_a_directory_in_the_place_of_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.toml").mkdir()
    with pytest.raises(ConfigError, match=r"config\.toml cannot be read"):
        load(tmp_path)


def test_a_file_as_large_as_allowed_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("[server]\nport = 1\n".ljust(1024 * 1024, "#"))
    assert load(tmp_path).settings.server.port == 1


def test_settings_cannot_be_changed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load(tmp_path).settings.server.port = 1
    assert ServerSettings().port == 3020


def test_importing_the_package_imports_no_pydantic() -> None:
    program = "import sys, blixard.config; sys.exit('pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_the_package_has_the_names_it_promises() -> None:
    import blixard.config

    assert sorted(blixard.config.__all__) == blixard.config.__all__
    assert all(getattr(blixard.config, name) for name in blixard.config.__all__)
    with pytest.raises(AttributeError):
        blixard.config.nonsense  # noqa: B018  looking it up is the test
