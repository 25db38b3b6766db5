"""Whatever a checkpoint's files hold: it is loaded as what it says, or refused by name; nothing in it is ever run.

FUZZ_EXAMPLES=20000 tries more, and other ones in every run.
"""

from __future__ import annotations

import builtins
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
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from dissect_clip.checkpoint import (
    Checkpoint,
    Plan,
    Policy,
    find_latest,
    load_checkpoint,
    pack,
    save_checkpoint,
)
from dissect_clip.config.settings import Config
from dissect_clip.data.state import DataState
from dissect_clip.distributed.world import World
from dissect_clip.errors import SetupError
from dissect_clip.models.weights import ModelWeights
from dissect_clip.run.stateful import Stateful
from dissect_clip.selection import Selection
from dissect_clip.selection.state import SelectionState
from dissect_clip.selection.store import ScoreStore
from dissect_clip.training.state import OptimizerState, ProgressState, RunSettings
from dissect_clip.training.step import Counters

EXAMPLES = os.environ.get("FUZZ_EXAMPLES")
WEIGHTS = {"weight": torch.full((2, 3), 7.0), "bias": torch.zeros(2)}
NAME = "epoch_2_step_12.pt"
SCORES = "epoch_2_step_12.scores.safetensors"
DATA: Any = SimpleNamespace(
    epoch=2, num_samples=5, fingerprint="abc", shard_names=("a.tar", "b.tar"), shard_sizes=np.array([2, 3]),
    inside_epoch=True, state_dict=lambda: {"layout": {"world size": 1}, "workers": torch.arange(3)},
)  # fmt: skip


def tries(number: int) -> Callable[[Any], Any]:
    """So many examples, the same in every run unless FUZZ_EXAMPLES asks for more."""
    return settings(
        max_examples=int(EXAMPLES or number),
        derandomize=EXAMPLES is None,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
    )


def make_parts() -> dict[str, Stateful]:
    """The parts of a run, as the command line puts them together."""
    config = Config.of(select=True, select_strategy="big_loss", seed=3)
    module, counters = torch.nn.Linear(3, 2), Counters(epoch=2, epoch_step=2, step=12, batch=24, seen=96, trained=48)
    module.load_state_dict(WEIGHTS)
    selection = Selection("big_loss", rate=0.5, num_samples=5, epochs=9)
    selection.name, selection.store = "big_loss", ScoreStore(5, ("loss",), World())
    return {
        "state_dict": ModelWeights(module, "tiny"),
        "optimizer": OptimizerState(torch.optim.SGD([module.weight], lr=0.1)),
        "data": DataState(DATA),
        "progress": ProgressState(counters, DATA, 2, 5),
        "selection": SelectionState(selection, 3, counters),
        "run": RunSettings(config, World()),
    }


def write_format_2(folder: Path) -> None:
    """A checkpoint as the version before has written it."""
    dissect = {
        "format_version": 2, "step": 12, "batch": 24, "seen": 96, "trained": 48, "seconds": {"load": 0.5}, "seed": 3,
        "model": "tiny", "strategy": "big_loss", "select_rate": 0.5, "num_samples": 5, "fingerprint": "abc",
        "world_size": 1, "columns": ("loss",), "epoch_step": 2, "steps_per_epoch": 5, "batch_size": 4, "accum_freq": 2,
        "workers": 0, "scored": 0, "score_refresh": None, "select_before_load": None, "survey": (), "survey_of": None,
        "depends_on": None, "loader": {"layout": {"world size": 1}, "workers": torch.arange(3)},
        "shards": {"names": '["a.tar", "b.tar"]', "sizes": torch.tensor([2, 3])}, "reference": None,
        "decoys": torch.arange(6, dtype=torch.int32).reshape(2, 3), "token": "0123456789abcdef", "scores_file": SCORES,
    }  # fmt: skip
    optimizer = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    content = {"epoch": 2, "name": "run", "state_dict": WEIGHTS, "optimizer": optimizer, "scaler": {"scale": 8.0}}
    torch.save({**content, "dissect": dissect}, folder / NAME)
    metadata = {"token": "0123456789abcdef", "columns": '["loss"]', "epoch": "2"}
    save_file({"scores": torch.full((5, 1), torch.nan)}, folder / SCORES, metadata)


def write_format_3(folder: Path) -> None:
    parts = make_parts()
    states = {name: part.state_dict() for name, part in parts.items()}
    states["selection"]["decoy_captions"] = torch.arange(6, dtype=torch.int32).reshape(2, 3)
    content = pack(states, parts, name="run", model="tiny")
    content.pt["scaler"] = {"scale": 8.0}
    plan, policy = Plan((NAME.removesuffix(".pt"),), (2, 12)), Policy(Config.of().checkpoint, 9)
    save_checkpoint(folder, content, plan=plan, policy=policy)


@functools.cache
def whole(version: int) -> dict[str, bytes]:
    """The files of a checkpoint of a format."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (write_format_2 if version == 2 else write_format_3)(folder)
        return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(params=[2, 3], ids=lambda version: f"format{version}")
def version(request: pytest.FixtureRequest) -> int:
    number: int = request.param
    return number


@pytest.fixture
def folder(tmp_path: Path, version: int) -> Path:
    """A folder with a whole checkpoint."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for name, content in whole(version).items():
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


def misfits(loaded: Checkpoint) -> list[str]:
    """What the parts of a run say against it, before anything of it is used."""
    return [misfit for name, part in make_parts().items() for misfit in part.misfits(loaded.parts.get(name))]


def check_types(loaded: Checkpoint) -> None:
    assert type(loaded.epoch) is int
    assert all(isinstance(tensor, torch.Tensor) for tensor in loaded.parts["state_dict"].values())
    assert all(type(state) is dict for state in loaded.parts.values())
    found = misfits(loaded)
    assert all(isinstance(misfit, str) for misfit in found)
    if not found:
        progress, selection = loaded.parts["progress"], loaded.parts["selection"]
        assert all(type(progress[name]) is int for name in ("epoch", "epoch_step", "batch", "seen", "trained"))
        assert all(type(seconds) in (int, float) for seconds in progress["seconds"].values())
        assert selection["scores"].shape == (5, 1)
        captions = selection["decoy_captions"]
        assert captions is None or (captions.dtype, captions.dim()) == (torch.int32, 2)


def unchanged(loaded: Checkpoint) -> bool:
    parts = loaded.parts
    return (
        all(torch.equal(parts["state_dict"][name], tensor) for name, tensor in WEIGHTS.items())
        and (parts["progress"]["step"], parts["progress"]["seen"]) == (12, 96)
        and parts["selection"]["columns"] == ("loss",)
        and misfits(loaded) == []
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


def test_the_whole_one_is_loaded(folder: Path, version: int) -> None:
    loaded = load(folder)
    assert loaded is not None
    assert unchanged(loaded)


@tries(100)
@given(changes=edits)
def test_other_bytes_in_the_pt(folder: Path, version: int, changes: list[tuple[str, int, bytes]]) -> None:
    (folder / NAME).write_bytes(edited(whole(version)[NAME], changes))
    loaded = load(folder)
    assert loaded is None or unchanged(loaded)


@tries(100)
@given(changes=edits)
def test_other_bytes_in_the_scores(folder: Path, version: int, changes: list[tuple[str, int, bytes]]) -> None:
    (folder / SCORES).write_bytes(edited(whole(version)[SCORES], changes))
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
def test_another_header_of_the_scores(folder: Path, version: int, entry: Any, size: int | None) -> None:
    content = whole(version)[SCORES]
    length = struct.unpack("<Q", content[:8])[0]
    before = json.loads(content[8 : 8 + length])
    text = json.dumps(entry if size is None else {**before, "scores": entry}).encode()
    (folder / SCORES).write_bytes(struct.pack("<Q", len(text) if size is None else size) + text + content[8 + length :])
    load(folder)


@tries(100)
@given(changes=edits)
def test_another_pickle_with_right_checksums(folder: Path, version: int, changes: list[tuple[str, int, bytes]]) -> None:
    rezip(folder / NAME, version, lambda content: edited(content, changes))
    load(folder)


def rezip(path: Path, version: int, change: Callable[[bytes], bytes]) -> None:
    """Change the pickle in a checkpoint as somebody would who can also make it look right."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole(version)[NAME])) as old, zipfile.ZipFile(made, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, change(content) if name.endswith("/data.pkl") else content)
    path.write_bytes(made.getvalue())


@functools.cache
def places(version: int) -> list[tuple[int, int]]:
    """Where the operations of the pickle begin and end."""
    with zipfile.ZipFile(io.BytesIO(whole(version)[NAME])) as archive:
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
def test_other_operations_in_the_pickle(folder: Path, version: int, changes: list[tuple[int, str, bytes]]) -> None:
    def change(content: bytes) -> bytes:
        for number, kind, operation in sorted(changes, reverse=True, key=lambda entry: entry[0] % len(places(version))):
            start, end = places(version)[number % len(places(version))]
            new = b"" if kind == "delete" else operation
            content = content[:start] + new + content[start if kind == "insert" else end :]
        return content

    rezip(folder / NAME, version, change)
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
OPENCLIP = ["epoch", "name", "state_dict", "optimizer", "scaler", "dissect"]


def content_of(version: int) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(io.BytesIO(whole(version)[NAME]), weights_only=True)
    return content


@functools.cache
def entries(version: int) -> list[tuple[str, ...]]:
    """Where the values of a checkpoint stand: by the keys that lead there."""
    dissect = content_of(version)["dissect"]
    found: list[tuple[str, ...]] = [(key,) for key in OPENCLIP] + [("dissect", key) for key in dissect]
    for part, state in dissect.get("parts", {}).items():
        found += [("dissect", "parts", part), *(("dissect", "parts", part, key) for key in state)]
    return (
        [*found, ("dissect", "tensors", "scores"), ("dissect", "tensors", "scores", "shape")] if version == 3 else found
    )


def at(content: dict[str, Any], entry: tuple[str, ...]) -> dict[str, Any]:
    """The dict that holds an entry."""
    for key in entry[:-1]:
        content = content[key]
    return content


@tries(250)
@given(number=st.integers(0), value=plain)
def test_other_values(folder: Path, version: int, number: int, value: Any) -> None:
    content, entry = content_of(version), entries(version)[number % len(entries(version))]
    at(content, entry)[entry[-1]] = value
    torch.save(content, folder / NAME)
    load(folder)


MAY_LACK: dict[int, set[tuple[str, ...]]] = {
    2: {("dissect", key) for key in ("loader", "shards", "reference", "decoys", "survey", "survey_of", "depends_on")},
    3: {("dissect", "parts", "data"), ("dissect", "parts", "run"), ("dissect", "parts", "progress", "steps_per_epoch")},
}
"""Besides OpenCLIP's keys."""


def test_a_missing_value(folder: Path, version: int) -> None:
    for entry in entries(version):
        content = content_of(version)
        del at(content, entry)[entry[-1]]
        torch.save(content, folder / NAME)
        loaded = load(folder)
        if entry in MAY_LACK[version]:
            assert loaded is not None, entry
        elif entry[0] == "dissect" and len(entry) > 1:
            assert loaded is None or misfits(loaded), entry
        else:
            assert (loaded is None) == (entry == ("state_dict",)), entry


@tries(40)
@given(names=plain, sizes=plain)
def test_other_lists_of_shards(folder: Path, version: int, names: Any, sizes: Any) -> None:
    content = content_of(version)
    dissect = content["dissect"]
    (dissect if version == 2 else dissect["parts"]["data"])["shards"] = {"names": names, "sizes": sizes}
    torch.save(content, folder / NAME)
    load(folder)


@pytest.mark.parametrize("captions", [torch.zeros(2, 3), torch.zeros(2, dtype=torch.int32), [1, 2]], ids=str)
def test_decoys_of_another_kind_are_refused(folder: Path, version: int, captions: object) -> None:
    content = content_of(version)
    dissect = content["dissect"]
    if version == 2:
        dissect["decoys"] = captions
    else:
        dissect["parts"]["selection"]["decoy_captions"] = captions
    torch.save(content, folder / NAME)
    loaded = load(folder)
    assert loaded is None or any("decoy" in misfit for misfit in misfits(loaded))


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
def test_code_never_runs(folder: Path, version: int, tmp_path: Path, harm: str, form: str) -> None:
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
def test_scores_are_never_sought_elsewhere(folder: Path, version: int, name: str) -> None:
    content = content_of(version)
    content["dissect"]["scores_file"] = name
    torch.save(content, folder / NAME)
    assert load(folder) is None
