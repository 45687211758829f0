"""Settings: where they come from, what they may be, and how they are printed."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from denoised_server import config
from denoised_server.config import Settings, SettingsError


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"DENOISED_{name.upper()}", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_flags_go_before_the_environment_before_the_file_before_defaults(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = write(tmp_path / "denoised.toml", "max_waiting = 1\nmax_running = 1\nmax_joined = 1\n")
    monkeypatch.setenv("DENOISED_MAX_WAITING", "2")
    monkeypatch.setenv("DENOISED_MAX_RUNNING", "2")
    settings = config.read({"max_waiting": 3}, file)
    assert (settings.max_waiting, settings.max_running, settings.max_joined) == (3, 2, 1)
    assert settings.address == "127.0.0.1:50051"


def test_an_empty_configuration_serves() -> None:
    settings = config.read({}, None)
    assert settings.device == "auto"
    assert settings.state_dir.name == "denoised"


def test_variables_of_the_sdk_are_none_of_our_business(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DENOISED_TARGET", "somewhere:1")
    config.read({}, None)


@pytest.mark.parametrize(
    ("name", "value", "meant"),
    [
        ("default_ttl", "90s", 90),
        ("default_ttl", "24h", 86_400),
        ("max_ttl", 5, 5),
        ("max_message_bytes", "64MiB", 64 * 2**20),
        ("max_message_bytes", 2_000_000, 2_000_000),
        ("memory_budget", "auto", "auto"),
        ("headroom", "2GiB", 2 * 2**30),
        ("headroom", "0%", 0.0),
        ("working_set", "7.5%", 0.075),
        ("memory_budget", "20GiB", 20 * 2**30),
        ("memory_budget", "1.5GB", 1_500_000_000),
        ("memory_budget", "80%", 0.8),
        ("memory_budget", "100%", 1.0),
        ("memory_budget", 123, 123),
        ("workers", "2", 2),
        ("threads", "auto", "auto"),
        ("allow_dirs", "/a:/b", [Path("/a"), Path("/b")]),
        ("allow_dirs", [Path("/a")], [Path("/a")]),
        ("address", "[::1]:50051", "[::1]:50051"),
    ],
)
def test_these_values_are_understood(name: str, value: object, meant: object) -> None:
    assert getattr(config.read({name: value}, None), name) == meant


def test_directories_in_the_environment_are_separated_as_in_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DENOISED_ALLOW_DIRS", "/a:/b")
    assert config.read({}, None).allow_dirs == [Path("/a"), Path("/b")]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("address", "localhost"),
        ("address", ":1"),
        ("address", "host:99999"),
        ("workers", 0),
        ("workers", "many"),
        ("threads", -1),
        ("default_ttl", "soon"),
        ("default_ttl", 0),
        ("memory_budget", "0%"),
        ("working_set", -1),
        ("memory_budget", "a lot"),
        ("memory_budget", -5),
        ("max_message_bytes", "1 KiB"),
        ("max_running", 0),
    ],
)
def test_these_values_are_refused_by_the_name_of_the_setting(name: str, value: object) -> None:
    with pytest.raises(SettingsError, match=f"^{name}: "):
        config.read({name: value}, None)


def test_an_unknown_setting_comes_with_the_nearest_that_there_is(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="did you mean max_waiting"):
        config.read({}, write(tmp_path / "a.toml", "max_waitng = 1"))
    with pytest.raises(SettingsError, match="--print-config"):
        config.read({"colour": "blue"}, None)


def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path: Path) -> None:
    for file in (tmp_path / "absent.toml", write(tmp_path / "a.toml", "max_waiting = ")):
        with pytest.raises(SettingsError, match=file.name):
            config.read({}, file)


def test_what_is_printed_says_the_same_when_it_is_read(tmp_path: Path) -> None:
    settings = config.read({"memory_budget": "75%", "allow_dirs": ["/a b", '/"quoted"'], "drain_grace": "90s"}, None)
    printed = settings.to_toml()
    assert config.read({}, write(tmp_path / "a.toml", printed)).model_dump() == settings.model_dump()
    assert set(tomllib.loads(printed)) == set(Settings.model_fields)


def test_every_setting_is_explained_with_its_default() -> None:
    printed = config.read({}, None).to_toml()
    for name, field in Settings.model_fields.items():
        above = printed.split(f"\n{name} = ")[0].rsplit("\n\n", 1)[1]
        assert above.startswith("# ")
        assert "Default: " in above
        assert (field.description or "").endswith(".")
