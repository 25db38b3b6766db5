"""Whatever a checkpoint's files hold: it is loaded as what it says, or refused by name; nothing in it is ever run.

FUZZ_EXAMPLES=20000 tries more, and other ones in every run.
"""

from __future__ import annotations

import builtins
import contextlib
import dataclasses
import functools
import io
import json
import os
import pickle
import pickletools
import struct
import subprocess
import tempfile
import typing
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dissect_clip.checkpoint import (
    Checkpoint,
    Plan,
    Policy,
    RunState,
    Shards,
    check_fits,
    checkpoint_content,
    find_latest,
    load_checkpoint,
    save_checkpoint,
)
from dissect_clip.config.settings import Config
from dissect_clip.distributed.world import World
from dissect_clip.errors import SetupError
from dissect_clip.selection.store import ScoreStore

EXAMPLES = os.environ.get("FUZZ_EXAMPLES")
STATE = RunState(
    step=12, batch=24, seen=96, trained=48, seconds={"load": 0.5}, seed=3, model="tiny", strategy="big_loss",
    select_rate=0.5, num_samples=5, fingerprint="abc", world_size=1, columns=("loss",), epoch_step=2, steps_per_epoch=5,
    batch_size=4, accum_freq=2, workers=0,
)  # fmt: skip
WEIGHTS = {"weight": torch.full((2, 3), 7.0), "bias": torch.zeros(2)}
NAME = "epoch_2_step_12.pt"
SCORES = "epoch_2_step_12.scores.safetensors"


def tries(number: int) -> Callable[[Any], Any]:
    """So many examples, the same in every run unless FUZZ_EXAMPLES asks for more."""
    return settings(
        max_examples=int(EXAMPLES or number),
        derandomize=EXAMPLES is None,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
    )


def make_content() -> dict[str, Any]:
    optimizer = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    loader = {"layout": {"world size": 1}, "workers": torch.arange(3)}
    shards = Shards(("a.tar", "b.tar"), np.array([2, 3]))
    return checkpoint_content(
        name="run", model=WEIGHTS, optimizer=optimizer, scaler={"scale": 8.0}, state=STATE, loader=loader,
        shards=shards, decoys=torch.arange(6, dtype=torch.int32).reshape(2, 3),
    )  # fmt: skip


@functools.cache
def whole() -> dict[str, bytes]:
    """The files of a checkpoint."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        scores = ScoreStore(5, ("loss",), World()).state_dict()
        plan, policy = Plan((NAME.removesuffix(".pt"),), (2, 12)), Policy(Config.of().checkpoint, 9)
        save_checkpoint(folder, make_content(), scores, plan=plan, policy=policy)
        return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a whole checkpoint."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for name, content in whole().items():
        (folder / name).write_bytes(content)
    return folder


def load(folder: Path) -> Checkpoint | None:
    """A checkpoint of the types it should be of, or None where it was refused by name; both ways agree."""
    found = find_latest(folder)
    try:
        loaded = load_checkpoint(folder / NAME)
    except SetupError as refusal:
        words = str(refusal)
    else:
        assert found == folder / NAME
        check_types(loaded)
        return loaded
    assert "epoch_2_step_12." in words
    assert words.isprintable()
    assert found is None
    return None


def check_types(loaded: Checkpoint) -> None:
    assert type(loaded.epoch) is int
    assert all(isinstance(tensor, torch.Tensor) for tensor in loaded.state_dict.values())
    for value in (loaded.optimizer, loaded.scaler, loaded.loader):
        assert value is None or type(value) is dict
    assert loaded.state is None or is_well_typed(loaded.state)
    assert loaded.decoys is None or (loaded.decoys.dtype, loaded.decoys.dim()) == (torch.int32, 2)
    with contextlib.suppress(SetupError):
        check_fits(
            loaded, model_name="tiny", model_state_dict=WEIGHTS, num_samples=5, fingerprint="abc", strategy="big_loss",
            columns=("loss",), shards=Shards(("a.tar", "b.tar"), np.array([2, 3])),
        )  # fmt: skip
        assert loaded.scores is not None
        assert loaded.scores.shape == (5, 1)


def is_well_typed(state: RunState) -> bool:
    kinds = {"int": (int,), "float": (int, float), "str": (str,), "None": (type(None),), "dict": (dict,)}
    for field in dataclasses.fields(state):
        allowed = [kind for word in field.type.split(" | ") for kind in kinds.get(word.split("[")[0], (tuple,))]
        if not isinstance(getattr(state, field.name), tuple(allowed)):
            return False
    return all(isinstance(name, str) for name in state.columns)


def unchanged(loaded: Checkpoint) -> bool:
    return all(torch.equal(loaded.state_dict[name], tensor) for name, tensor in WEIGHTS.items()) and (
        loaded.state == STATE
    )


# ---- bytes

edits = st.lists(
    st.tuples(
        st.sampled_from(["set", "insert", "delete", "truncate", "repeat"]), st.integers(0), st.binary(max_size=8)
    ),
    min_size=1,
    max_size=4,
)


def edited(content: bytes, changes: list[tuple[str, int, bytes]]) -> bytes:
    for kind, at, new in changes:
        at %= len(content) + 1
        end = at + len(new)
        content = {
            "set": content[:at] + new + content[end:],
            "insert": content[:at] + new + content[at:],
            "delete": content[:at] + content[end:],
            "truncate": content[:at],
            "repeat": content[:at] + content[at:] * 2,
        }[kind]
    return content


def test_the_whole_one_is_loaded(folder: Path) -> None:
    loaded = load(folder)
    assert loaded is not None
    assert unchanged(loaded)


@tries(100)
@given(changes=edits)
def test_other_bytes_in_the_pt(folder: Path, changes: list[tuple[str, int, bytes]]) -> None:
    (folder / NAME).write_bytes(edited(whole()[NAME], changes))
    loaded = load(folder)
    assert loaded is None or unchanged(loaded)


@tries(100)
@given(changes=edits)
def test_other_bytes_in_the_scores(folder: Path, changes: list[tuple[str, int, bytes]]) -> None:
    (folder / SCORES).write_bytes(edited(whole()[SCORES], changes))
    load(folder)


header = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2**64) | st.sampled_from(["F32", "F64", "U8", "BOOL", "F4", ""]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["dtype", "shape", "data_offsets", "scores", "__metadata__", "token"]), inner, max_size=4
    ),
    max_leaves=8,
)  # fmt: skip


@tries(80)
@given(entry=header, size=st.none() | st.integers(0, 2**64 - 1))
def test_another_header_of_the_scores(folder: Path, entry: Any, size: int | None) -> None:
    content = whole()[SCORES]
    length = struct.unpack("<Q", content[:8])[0]
    before = json.loads(content[8 : 8 + length])
    text = json.dumps(entry if size is None else {**before, "scores": entry}).encode()
    (folder / SCORES).write_bytes(struct.pack("<Q", len(text) if size is None else size) + text + content[8 + length :])
    load(folder)


@tries(100)
@given(changes=edits)
def test_another_pickle_with_right_checksums(folder: Path, changes: list[tuple[str, int, bytes]]) -> None:
    rezip(folder / NAME, lambda content: edited(content, changes))
    load(folder)


def rezip(path: Path, change: Callable[[bytes], bytes]) -> None:
    """Change the pickle in a checkpoint as somebody would who can also make it look right."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole()[NAME])) as old, zipfile.ZipFile(made, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, change(content) if name.endswith("/data.pkl") else content)
    path.write_bytes(made.getvalue())


@functools.cache
def places() -> list[tuple[int, int]]:
    """Where the operations of the pickle begin and end."""
    with zipfile.ZipFile(io.BytesIO(whole()[NAME])) as archive:
        name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        starts = [at for _, _, at in pickletools.genops(archive.read(name))]
    return list(zip(starts, [*starts[1:], starts[-1] + 1], strict=True))


OPERATIONS = [
    b"N", b"\x88", b"}", b"]", b")", b"0", b"2", b"t", b"R", b"b", b"a", b"s", b"u", b"Q", b"(", b"h\x01", b"K\xff",
    b"M\xff\xff", b"J\xff\xff\xff\x7f", b"\x8a\x08" + b"\xff" * 7 + b"\x7f", b"G\x7f\xf0" + bytes(6), b"X\x01\0\0\0a",
]  # fmt: skip


@tries(100)
@given(
    st.lists(
        st.tuples(st.integers(0), st.sampled_from(["set", "insert", "delete"]), st.sampled_from(OPERATIONS)), max_size=3
    )
)
def test_other_operations_in_the_pickle(folder: Path, changes: list[tuple[int, str, bytes]]) -> None:
    def change(content: bytes) -> bytes:
        for number, kind, operation in sorted(changes, reverse=True, key=lambda entry: entry[0] % len(places())):
            start, end = places()[number % len(places())]
            new = b"" if kind == "delete" else operation
            content = content[:start] + new + content[start if kind == "insert" else end :]
        return content

    rezip(folder / NAME, change)
    load(folder)


# ---- values

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.binary(max_size=4)
    | st.sampled_from([torch.ones(2), torch.arange(2), torch.zeros(0), torch.Size([2])]),
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner) | st.dictionaries(
        st.text(max_size=4) | st.integers(), inner, max_size=3
    ),
    max_leaves=5,
)  # fmt: skip
PARTS = ["epoch", "name", "state_dict", "optimizer", "scaler", "dissect"]
FIELDS = [
    *(field.name for field in dataclasses.fields(RunState)),
    "format_version",
    "loader",
    "shards",
    "token",
    "scores_file",
]


@tries(200)
@given(part=st.sampled_from(PARTS) | st.sampled_from(FIELDS), value=plain)
def test_other_values(folder: Path, part: str, value: Any) -> None:
    content = torch.load(io.BytesIO(whole()[NAME]), weights_only=True)
    (content if part in PARTS else content["dissect"])[part] = value
    torch.save(content, folder / NAME)
    load(folder)


@pytest.mark.parametrize("part", [*PARTS, *FIELDS])
def test_a_missing_value(folder: Path, part: str) -> None:
    content = torch.load(io.BytesIO(whole()[NAME]), weights_only=True)
    del (content if part in PARTS else content["dissect"])[part]
    torch.save(content, folder / NAME)
    loaded = load(folder)
    later = ("survey", "survey_of", "depends_on")  # which older files do not have
    assert loaded is not None or part not in later
    assert loaded is None or part in ("epoch", "name", "optimizer", "scaler", "dissect", "loader", "shards", *later)


@tries(40)
@given(names=plain, sizes=plain)
def test_other_lists_of_shards(folder: Path, names: Any, sizes: Any) -> None:
    content = torch.load(io.BytesIO(whole()[NAME]), weights_only=True)
    content["dissect"]["shards"] = {"names": names, "sizes": sizes}
    torch.save(content, folder / NAME)
    load(folder)


# ---- code


class Runs:
    """Runs a function when it is unpickled by something careless."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


def harms(marker: Path) -> dict[str, Any]:
    """Objects that make the marker, each in a way that pickle.load obeys."""
    make = f"open({str(marker)!r}, 'w')"
    return {
        "system": Runs(os.system, f"touch {marker}"),
        "eval": Runs(eval, make),
        "exec": Runs(exec, make),
        "open": Runs(open, str(marker), "w"),
        "getattr": Runs(getattr, Runs(__import__, "os"), "system"),
        "popen": Runs(subprocess.Popen, ["touch", str(marker)]),
        "import": Runs(builtins.__import__, "antigravity"),
        "partial": Runs(functools.partial, eval, make),
        "touch": Runs(Path.touch, marker),
        "torch.load": Runs(torch.load, str(marker)),
        "torch.save": Runs(torch.save, 1, str(marker)),
        "typing": Runs(typing.get_type_hints, 5),
    }


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
@pytest.mark.parametrize("harm", harms(Path("x")))
def test_code_never_runs(folder: Path, tmp_path: Path, harm: str, form: str) -> None:
    marker = tmp_path / "marker"
    culprit = harms(marker)[harm]
    weights = {"state_dict": {"w": torch.ones(1)}}
    for content in (
        culprit,
        {"state_dict": culprit},
        {**weights, "optimizer": culprit},
        {**weights, "dissect": culprit},
    ):
        if form == "pickle":
            (folder / NAME).write_bytes(pickle.dumps(content, protocol=2))
        else:
            torch.save(content, folder / NAME, _use_new_zipfile_serialization=form == "zip")
        assert load(folder) is None
        assert not marker.exists()


@pytest.mark.parametrize("name", ["../other", "/etc/passwd", "", ".", "..", "a/b", "file://x", "a\nb", "\x1b[2J"])
def test_scores_are_never_sought_elsewhere(folder: Path, name: str) -> None:
    content = torch.load(io.BytesIO(whole()[NAME]), weights_only=True)
    content["dissect"]["scores_file"] = name
    torch.save(content, folder / NAME)
    assert load(folder) is None
