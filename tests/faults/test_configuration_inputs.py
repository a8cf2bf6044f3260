"""Recipes and flags that nobody would write, and those that somebody might."""

import datetime
import os
from pathlib import Path

import numpy as np
import pytest
import yaml
from harness import damaged
from hypothesis import given
from hypothesis import strategies as st

from nvae_tf import config
from nvae_tf.cli import evaluate, import_official, inspect, prepare, train, tune
from nvae_tf.cli.flags import Parser, configured
from nvae_tf.config import KEYS
from nvae_tf.io.errors import UserError
from nvae_tf.tuning.space import load_space

RECIPE = (config.RECIPES / "digits.yaml").read_bytes()
TOKENS = [
    b"!!python/object/apply:os.system ['touch ran']", b"&a [*a]", b"<<: *a", b"&a {x: *a}",
    b"9" * 5000, b"2001-99-99", b"!!timestamp x", b"!!int x", b"!!float x", b"!!binary '='",
    b"0x", b"[" * 3000, b"{" * 3000, b"- " * 2000, b"? [a, b]\n: 1\n", b"\0", b"\xff\xfe", b"---\n",
    b"epochs: 1e400\n", b"epochs: -.inf\n", b"learning_rate: .nan\n", b"epochs: 190:20:30\n",
    b"\xe2\x80\xa8", b"'" * 100, b"%YAML 9.9\n", b"!<tag:yaml.org,2002:set> {a, b}",
]  # fmt: skip
BOMB = b"a: &a [x, x, x, x, x, x, x, x, x]\n" + b"".join(
    b"%c: &%c [%s]\n" % (c, c, b", ".join([b"*%c" % (c - 1)] * 9)) for c in range(98, 123)
)
MERGES = b"a: &a {x: 1}\n" + b"".join(
    b"%c: &%c {<<: [*%c, *%c]}\n" % (c, c, c - 1, c - 1) for c in range(98, 123)
)
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20),
    st.integers(1, 8), st.floats(0.0, 1.0), st.sampled_from(["none", "auto", "off", "5m"]),
    st.sampled_from([10**30, -(10**30), 2**31, 1e308, "1e400", "-0", "1_000", "0x10", "", "~", "nan"]),
    st.dates().map(lambda day: datetime.date(day.year, day.month, day.day)),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
NAMES = st.one_of(st.sampled_from(list(KEYS)), st.text(max_size=12), st.integers(), st.none())


def load(path, content):
    path.write_bytes(content)
    return config.load(str(path))


@given(content=st.one_of(st.binary(max_size=200), st.text(max_size=200).map(str.encode)))
def test_random_bytes_as_a_recipe(counts, tmp_path, content):
    counts.check(lambda: load(tmp_path / "x.yaml", content))


@given(content=damaged(RECIPE, TOKENS))
def test_damaged_recipes(counts, tmp_path, content):
    counts.check(lambda: load(tmp_path / "x.yaml", content))
    assert not (tmp_path / "ran").exists()


@given(values=st.dictionaries(NAMES, st.one_of(SCALARS, VALUES), max_size=3))
def test_recipes_with_impossible_values(counts, tmp_path, values):
    content = yaml.safe_dump(values).encode()
    result = counts.check(lambda: load(tmp_path / "x.yaml", content))
    if not isinstance(result, UserError):
        numbers = [v for v in result.to_dict().values() if not isinstance(v, (bool, str))]
        assert np.all(np.isfinite(np.float32(numbers)))
        reloaded = counts.check(lambda: load(tmp_path / "again.yaml", result.to_yaml().encode()))
        assert reloaded == result


@pytest.mark.parametrize(
    "content",
    [BOMB, MERGES, b"epochs: " + b"9" * 90_000, b"x" * 200_000, b"[" * 90_000, b"dataset: " + BOMB],
    ids=["aliases", "merges", "digits", "large", "deep", "aliases as a value"],
)
def test_bombs_as_recipes(counts, tmp_path, content):
    assert isinstance(counts.check(lambda: load(tmp_path / "x.yaml", content)), UserError)


@pytest.mark.parametrize(
    "name", ["x" * 5000, "~nobody-of-this-name/x", "a\0b", "/dev/zero", "", ".", "/proc/self/mem"]
)
def test_paths_that_are_no_recipe(counts, name):
    assert isinstance(counts.check(lambda: config.load(name)), UserError)


def test_paths_that_are_no_space(counts, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path, tmp_path / "nothing"):
        assert isinstance(counts.check(lambda path=path: load_space(path)), UserError)


COMMANDS = {
    "train": (train.main, train._parser, ["--dataset", "nosuch"]),
    "evaluate": (evaluate.main, evaluate._parser, ["--checkpoint", "nosuch"]),
    "tune": (tune.main, tune._parser, ["--space", "nosuch"]),
    "prepare": (prepare.main, prepare._parser, ["--input", "nosuch"]),
}
NASTY = [
    "", "-1", "0", "1", "2", "1e400", "nan", "inf", "-inf", "1e-400", "9" * 5000, str(2**31),
    str(2**63), "x", "../x", "/", "~nobody-of-this-name/x", "a\nb", "\udcff", "x" * 5000, "--", "-",
    "%s", "{}", "digits", "'", '"', "true", "\x1b[2J", "0x10", "1_0", "\u0661",
]  # fmt: skip


def flags_of(parser: Parser) -> list[str]:
    return [name for action in parser._actions for name in action.option_strings]


@pytest.fixture(scope="module", autouse=True)
def tensorflow():
    """Started, so that no case can divide the CPU for all others."""
    import tensorflow as tf

    tf.zeros(1)


@pytest.mark.parametrize("name", COMMANDS)
@given(data=st.data())
def test_random_flags(counts, tmp_path, name, data):
    main, parser, ending = COMMANDS[name]
    words = st.one_of(st.sampled_from(NASTY), st.text(max_size=10))
    flags = st.sampled_from(flags_of(parser()))
    pairs = data.draw(st.lists(st.tuples(flags, words), max_size=4))
    arguments = [
        word for flag, value in pairs for word in (flag, value)[: data.draw(st.integers(1, 2))]
    ]
    recipe = ["--config", "digits"] if name in ("train", "tune") else []
    arguments = [*recipe, *arguments, *ending]
    counts.check_command(main, ["images", *arguments] if name == "prepare" else arguments)
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} <= {".lock"}


def test_every_key_with_every_nasty_value(counts):
    for flag in set(KEYS) - {"data", "dataset"}:
        for value in NASTY:
            for words in ([f"--{flag}", value], [f"--{flag}={value}"]):
                arguments = ["--config", "digits", *words, "--dataset", "nosuch"]
                assert counts.check_command(train.main, arguments)


def test_a_key_that_takes_a_word_or_true_or_false(tmp_path):
    (tmp_path / "x.yaml").write_text("dataset: photos\nflip: true\n")

    def flip(*words):
        arguments = train._parser().parse_args(["--config", str(tmp_path / "x.yaml"), *words])
        return configured(arguments).config.data.flip

    assert flip() is flip("--flip") is flip("--flip", "true") is True
    assert flip("--no-flip") is flip("--flip", "false") is flip("--flip=off") is False
    assert flip("--flip", "auto") == "auto" and flip("--flip", "--seed", "3") is True


def test_names_of_runs_stay_in_the_root(counts):
    for name in ("~", "~root", "/tmp/x", "../x", "a/../../x", ".", "~nobody-of-this-name"):
        arguments = ["--config", "digits", "--save", name, "--dataset", "nosuch"]
        text = counts.check_command(train.main, arguments)
        assert "--save" in text and "expected the name of a folder in --root" in text


@pytest.mark.parametrize(
    ("command", "flag", "others"),
    [
        (train, "--save", ["--config", "digits"]),
        (train, "--root", ["--config", "digits"]),
        (train, "--init_from", ["--config", "digits"]),
        (tune, "--space", ["--config", "digits"]),
        (evaluate, "--output", ["--checkpoint", "nosuch"]),
        (evaluate, "--images", ["--checkpoint", "nosuch", "--eval_mode", "tiles"]),
        (prepare, "--output", ["images", "--input", "nosuch"]),
        (inspect, "--output", []),
    ],
)
def test_an_empty_path_is_not_the_current_folder(counts, command, flag, others):
    text = counts.check_command(command.main, [*others, flag, ""])
    assert f"argument {flag}: an empty text is not allowed" in text


def test_impossible_paths_of_an_import(counts):
    for name in ("x" * 5000, "~nobody-of-this-name/x"):
        assert "not usable as a path" in counts.check_command(import_official.main, [name, "out"])


def test_inspect(counts):
    for value in NASTY:
        for flag in ("--seconds", "--batch_size", "--output", "--seed"):
            counts.check_command(inspect.main, [flag, value, "--dataset", "nosuch"])
