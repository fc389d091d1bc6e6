from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from hilum.core.config import from_dict, override, parse_shard, read_yaml, to_dict, write_yaml
from hilum.core.errors import ConfigError, UnknownNameError


@dataclass(frozen=True)
class Optimiser:
    rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)


@dataclass(frozen=True)
class Settings:
    steps: int = 10
    flip: bool = True
    kind: Literal["linear", "decoder"] = "linear"
    compile: Literal["auto", "on", "off"] = "auto"
    rates: tuple[float, ...] = (1e-5, 1e-4)
    stop: int | None = None
    out: Path = Path("runs")
    optimiser: Optimiser = field(default_factory=Optimiser)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, found {self.steps}")
        if self.stop is not None and self.stop > self.steps:
            raise ValueError(f"stop must be at most {self.steps}, found {self.stop}")


def test_overrides_reach_every_kind_of_field() -> None:
    config = override(
        Settings(),
        ["steps=3", "flip=false", "kind=decoder", "rates=[1e-3]", "stop=2", "out=a/b", "optimiser.betas=[0.8, 0.9]"],
    )
    assert config == Settings(3, False, "decoder", "auto", (1e-3,), 2, Path("a/b"), Optimiser(betas=(0.8, 0.9)))


def test_on_and_off_are_words_where_they_are_choices(tmp_path: Path) -> None:
    assert [override(Settings(), [f"compile={word}"]).compile for word in ("on", "off", "auto")] == [
        "on",
        "off",
        "auto",
    ]
    (tmp_path / "config.yaml").write_text("compile: off\n")
    assert read_yaml(Settings, tmp_path / "config.yaml").compile == "off"
    with pytest.raises(UnknownNameError, match="'False'"):
        override(Settings(), ["kind=off"])


def test_a_key_that_is_no_text_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("on: 1\n")
    with pytest.raises(UnknownNameError, match="setting of Settings"):
        read_yaml(Settings, tmp_path / "config.yaml")
    with pytest.raises(UnknownNameError, match="setting of Optimiser"):
        override(Settings(), ["optimiser={1: 2}"])


@pytest.mark.parametrize("assignments", [["stop=20", "steps=30"], ["steps=30", "stop=20"]])
def test_settings_that_fit_only_together_come_in_any_order(assignments: list[str]) -> None:
    config = override(Settings(), assignments)
    assert (config.steps, config.stop) == (30, 20)
    with pytest.raises(ConfigError, match="stop must be at most 10"):
        override(Settings(), ["stop=20"])


def test_of_two_values_the_last_one_counts_and_a_group_may_be_given_whole() -> None:
    assert override(Settings(), ["steps=3", "steps=4"]).steps == 4
    both = override(Settings(), ["optimiser={rate: 0.5}", "optimiser.betas=[0, 0.5]"])
    assert both.optimiser == Optimiser(0.5, (0.0, 0.5))


def test_numbers_without_a_point_are_floats() -> None:
    assert override(Settings(), ["optimiser.rate=2e-4"]).optimiser.rate == 2e-4


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("step=3", "'steps'"),
        ("optimiser.rat=1", "'rate'"),
        ("kind=decodr", "'decoder'"),
    ],
)
def test_unknown_names_answer_with_the_nearest(text: str, expected: str) -> None:
    with pytest.raises(UnknownNameError, match=f"Did you mean {expected}"):
        override(Settings(), [text])


@pytest.mark.parametrize("text", ["steps", "=3", "steps=two", "flip=3", "optimiser.betas=[1]", "steps.x=1", "steps=0"])
def test_wrong_values_are_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        override(Settings(), [text])


def test_yaml_gives_back_what_was_written(tmp_path: Path) -> None:
    config = override(Settings(), ["stop=4", "rates=[5e-3, 1e-5]"])
    write_yaml(tmp_path / "config.yaml", config)
    assert read_yaml(Settings, tmp_path / "config.yaml") == config
    assert from_dict(Settings, to_dict(config)) == config


def test_unreadable_yaml_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("[1, 2]")
    with pytest.raises(ConfigError, match="expected a mapping"):
        read_yaml(Settings, tmp_path / "a.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_yaml(Settings, tmp_path / "none.yaml")


def test_jobs_are_counted_from_0() -> None:
    assert [parse_shard(text) for text in ("0/8", "7/8", "0/1", None)] == [(0, 8), (7, 8), (0, 1), (0, 1)]


@pytest.mark.parametrize("text", ["8/8", "9/8", "-1/8", "0/0", "3", "a/b", "1/", "/2", "1/2/3", "\u00b2/3", ""])
def test_a_job_that_is_none_of_them_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--shard: expected i/n with 0 <= i < n, as in 0/8"):
        parse_shard(text)
