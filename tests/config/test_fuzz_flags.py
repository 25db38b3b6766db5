"""Whatever stands on the command line: settings that can be written down, or one line that says what is wrong."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dissect_clip.config.flags import UNSUPPORTED
from dissect_clip.config.parser import parse_args
from dissect_clip.config.settings import Config, declared
from dissect_clip.selection import STRATEGIES

FLAGS = sorted({"--" + name.replace("_", "-") for name in declared()} | {"--output-dir", *UNSUPPORTED})
ODD = [
    "", " ", "-", "--", "---", "-1", "0", "1", "-0", "1e400", "nan", "inf", "1_000", "٣", "0x10", "9" * 5000, "none",
    "latest", "s3://x", "::", "{0..9}.tar", "{", "pipe:echo x", "../..", "\x00", "\n", "\x1b[2J", "\udcff", "🐈", "=",
    "%s", "%(prog)s", "adamw", "timm/x", "synthetic", "webdataset", "x.tar", "random", "tensorboard,wandb",
]  # fmt: skip
PAIRS = [
    "a=b", "a=", "a=1", "a=(0.5, 1.0)", "a=(((((", "a=" + "(" * 5000, "a=" + "-" * 5000 + "1", "a={1,2}", "a={[]:1}",
    "a={1:2}", "a=1e999", "a=[nan]", "a=b'x'", "a=1j", "a=...", "a=None", "a=\x00",
]  # fmt: skip
NUMBERS = [
    "0",
    "1",
    "-1",
    "0.5",
    "3",
    "1e-8",
    "nan",
    "inf",
    "-inf",
    "1e400",
    "9" * 400,
    "٣",
    "1_000",
    "0x10",
    "",
    " 1 ",
]

flag = st.sampled_from(FLAGS)
value = st.sampled_from(ODD) | st.text(max_size=12)
word = flag | value | st.builds("{}={}".format, flag, value) | flag.map(lambda text: text[:-2])


def fitting(field: dataclasses.Field[Any]) -> st.SearchStrategy[list[str]]:
    """A flag with a value that the parser is likely to take."""
    name = "--" + field.name.replace("_", "-")
    if field.type == "bool":
        return st.just([name])
    if field.metadata["choices"] is not None:
        return st.sampled_from(field.metadata["choices"]).map(lambda choice: [name, choice])
    if field.type.startswith(("int", "float", "tuple")):
        return st.sampled_from(NUMBERS).map(lambda number: [name, number])
    if field.type.startswith("dict"):
        return st.lists(st.sampled_from(PAIRS), max_size=2).map(lambda v: [name, *v])
    return value.map(lambda text: [f"{name}={text}"])


OPTIONS = [field for owners in STRATEGIES.flags(STRATEGIES).values() for field, _ in owners.values()]
FITTING = st.sampled_from([*(field for field, _ in declared().values()), *OPTIONS]).flatmap(fitting)
LIKELY = st.lists(FITTING, max_size=4).map(lambda groups: [word for group in groups for word in group])
UNLIKELY = st.lists(word, max_size=8)
RUNS = ["--dataset-type", "synthetic", "--train-num-samples", "10"]


def plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings with lists for tuples, as JSON has them."""
    return json.loads(json.dumps(settings))


def check(argv: list[str]) -> None:
    """Settings that survive JSON, or status 2 and a line that begins with ``error: ``."""
    said = io.StringIO()
    config: Config | None = None
    status: object = 0
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            config = parse_args(argv, STRATEGIES)
    except SystemExit as end:
        status = end.code
    if config is not None:
        survives_json(config)
    elif status == 0:
        assert said.getvalue().startswith("usage: ")  # of --help
    else:
        first, rest = said.getvalue().split("\n", 1)
        assert (status, rest) == (2, "See --help-all for all flags.\n")
        assert first.startswith("error: ")
        assert first.isprintable()


def survives_json(config: Config) -> None:
    """What is written to the run folder is JSON and holds all settings."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    read = json.loads(config.to_json(), parse_constant=refuse)
    assert read == plain(config.flat())
    fields = {name: tuple(v) if isinstance(v, list) else v for name, v in read.items()}
    assert plain(Config.of(**fields).flat()) == read
    assert all(math.isfinite(v) for v in config.flat().values() if isinstance(v, float))


@settings(max_examples=1000, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(LIKELY)
def test_settings_that_may_be_meant(words: list[str]) -> None:
    check([*RUNS, *words])


@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(UNLIKELY)
def test_any_words(words: list[str]) -> None:
    check(words)


@pytest.mark.parametrize("words", [["--opt=--"], ["--image-mean=--"], ["--epochs=--"], ["--name", "--"]], ids=str)
def test_found_before(words: list[str]) -> None:
    check([*RUNS, *words])


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair[:20])
def test_augmentation_settings(pair: str) -> None:
    check([*RUNS, "--aug-cfg", pair])
