"""From flags and YAML to a checked config, and from exceptions to exit codes."""

from dataclasses import dataclass
from typing import Literal

import pytest

from common import cli, runtime
from common.errors import UserError


@dataclass
class Config:
    lr: float = 0.1
    K: int = 4
    schedule: Literal["cosine", "linear"] = "cosine"
    betas: tuple[float, float] = (0.5, 0.999)
    flip: bool = True

    def __post_init__(self):
        if self.K < 1:
            raise ValueError("K must be at least 1")


def test_values_are_checked_and_converted():
    config = cli.build_config(Config, {"lr": "1e-3", "betas": [0.9, 0.99]}, "here")
    assert (config.lr, config.betas, config.K) == (0.001, (0.9, 0.99), 4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lrr": 1}, r"here: unknown config key 'lrr'; did you mean lr\? Known keys: lr, K, schedule, betas, flip"),
        ({"zzz": 1}, r"here: unknown config key 'zzz' Known keys: lr"),
        ({"lr": "fast"}, "here: lr: .*valid number.*'fast'"),
        ({"K": 2.5}, "here: K: .*integer.*2.5"),
        ({"schedule": "step"}, "here: schedule: .*'cosine' or 'linear'.*'step'"),
        ({"betas": [1]}, "here: betas"),
        ({"K": 0}, "here: config: K must be at least 1"),
    ],
)
def test_wrong_values_name_key_and_expectation(values, message):
    with pytest.raises(UserError, match=message):
        cli.build_config(Config, values, "here")


@pytest.mark.parametrize(
    ("pair", "expected"),
    [
        ("lr=0.1", {"lr": 0.1}),
        ("a=[1, 2]", {"a": [1, 2]}),
        ("b=true", {"b": True}),
        ("c=x=y", {"c": "x=y"}),
        ("d=", {"d": None}),
    ],
)
def test_settings(pair, expected):
    assert cli.parse_settings([pair]) == expected


@pytest.mark.parametrize("pair", ["lr", "=1", "lr=[1"])
def test_bad_settings(pair):
    with pytest.raises(UserError, match="--set"):
        cli.parse_settings([pair])


def test_load_config_names_what_there_is(tmp_path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "quick.yaml").write_text("train: {lr: 0.5}\nempty:\n")
    assert cli.load_config(Config, tmp_path, "quick", "train", K=2) == Config(lr=0.5, K=2)
    assert cli.load_config(Config, tmp_path, "quick", "empty") == Config()
    with pytest.raises(UserError, match="no config 'full' in .*; found: quick"):
        cli.load_config(Config, tmp_path, "full", "train")
    with pytest.raises(UserError, match="has no part 'search'; it has: train, empty"):
        cli.load_config(Config, tmp_path, "quick", "search")
    (tmp_path / "configs" / "quick.yaml").write_text("train: {lr: 0.5\nx: [")
    with pytest.raises(UserError, match="line 2: not valid YAML"):
        cli.load_config(Config, tmp_path, "quick", "train")
    (tmp_path / "configs" / "quick.yaml").write_text("- a\n")
    with pytest.raises(UserError, match="expected a mapping at the top, found list"):
        cli.load_config(Config, tmp_path, "quick", "train")


@pytest.mark.parametrize(
    ("error", "code", "start"),
    [
        (UserError("bad"), 2, "error: bad"),
        (runtime.NotFinite("nan"), 3, "stopped: nan"),
        (runtime.Collapsed("all on"), 3, "stopped: all on"),
        (runtime.Stopped("at step 3"), 75, "stopped by a signal, saved: at step 3"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_exit_codes_and_one_line(error, code, start, capsys):
    with pytest.raises(SystemExit) as stopped, cli.exit_codes():
        raise error
    assert stopped.value.code == code
    told = capsys.readouterr().err
    assert told.startswith(start)
    assert told.count("\n") == 1
