"""What SECURITY.md promises: no file runs code, no name found in data is a command or leads out of a folder."""

from __future__ import annotations

import ast
import json
import os
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from runs import arguments, selection, train
from shards_util import image_bytes, make_shard, make_shards, sample
from toy import TEXT, VIT, make_config

from dissect_clip.checkpoint import find_latest, load_checkpoint
from dissect_clip.cli import train as cli
from dissect_clip.config.settings import Config
from dissect_clip.data.formats.urls import expand
from dissect_clip.distributed.world import World
from dissect_clip.errors import SetupError
from dissect_clip.models.build import build_model, build_reference_model

PACKAGE = Path(cli.__file__).parent.parent
EXPERIMENTS = Path(__file__).resolve().parent.parent / "experiments"
SOURCES = {path.relative_to(folder.parent).as_posix().removeprefix("dissect_clip/"): path
           for folder in (PACKAGE, EXPERIMENTS) for path in sorted(folder.rglob("*.py"))}  # fmt: skip
ESCAPES = "\x1b[2J\x1b]0;owned\x07\r\x9b31m\u202e"


class Payload:
    """An object whose pickle makes a file when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A place where something appears if a door is open; ``COMMAND`` makes it appear."""
    path = tmp_path / "owned"
    monkeypatch.setenv("OWNED", str(path))
    yield path
    assert not path.exists()


COMMAND = "pipe:mkdir $OWNED #.tar"


# ---- no file runs code


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """Every call in a source file, with what is called as it is written."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


FORBIDDEN = re.compile(
    r"(.*\.)?(eval|exec|compile|__import__|Unpickler|import_module)|(pickle|joblib|dill|shelve|marshal)\..*|yaml\.(?!safe_).*"
    r"|os\.(system|popen|exec\w*|spawn\w*)|(np|numpy)\.load"
)
ALLOWED = {
    ("cli/main.py", "importlib.import_module"),  # of the names in COMMANDS
    ("config/strategies.py", "importlib.import_module"),  # of --select-strategy, and of installed entry points
    ("selection/__init__.py", "importlib.import_module"),  # of the names in _PLACES
    ("models/parallel.py", "torch.compile"),
    ("run/folder.py", "re.compile"),
    ("run/reporters.py", "importlib.import_module"),  # of --report-to
    ("training/scoring.py", "torch.compile"),
    ("experiments/schema.py", "yaml.compose"),  # with the SafeLoader; makes nodes, no objects
}


@pytest.mark.parametrize("source", SOURCES)
def test_the_source_calls_nothing_that_runs_what_it_reads(source: str) -> None:
    for name, node in calls(SOURCES[source]):
        words = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if name == "torch.load":
            assert words.get("weights_only") == "True", f"line {node.lineno}"
        harmless = name.endswith((".eval", "re.compile")) or (source, name) in ALLOWED
        assert harmless or not FORBIDDEN.fullmatch(name), f"line {node.lineno} calls {name}"
        if "shell" in words:  # for pipe: of the command line, whose tests are below
            assert source.endswith("/download.py"), f"line {node.lineno} starts a shell"


def bare(mark: Path) -> object:
    return Payload(mark)


def weights(mark: Path) -> object:
    return {"state_dict": {"x": torch.zeros(1)}, "epoch": 1, "optimizer": Payload(mark)}


@pytest.mark.parametrize("content", [bare, weights])
@pytest.mark.parametrize("protocol", ["zip", "legacy", "plain"])
def test_a_checkpoint_runs_nothing(
    tmp_path: Path, mark: Path, content: Callable[[Path], object], protocol: str
) -> None:
    path = tmp_path / "epoch_1.pt"
    write(path, content(mark), protocol)
    with pytest.raises(SetupError, match="cannot be read as a checkpoint"):
        load_checkpoint(path)
    assert find_latest(tmp_path) is None


def write(path: Path, content: object, protocol: str) -> None:
    if protocol == "plain":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=protocol == "zip")


def build_both(config: Config, reference: Path | None) -> None:
    model = build_model(config, World())
    if reference is not None:
        build_reference_model(config, str(reference), None, World(), model.module, model.tokenizer)


@pytest.mark.parametrize("flag", ["pretrained", "distill_pretrained", "select_reference"])
@pytest.mark.parametrize("protocol", ["zip", "legacy", "plain"])
def test_weights_run_nothing(tmp_path: Path, mark: Path, flag: str, protocol: str) -> None:
    path = tmp_path / "weights.pt"
    write(path, weights(mark), protocol)
    reference = path if flag == "select_reference" else None
    changes: dict[str, Any] = {} if reference else {flag: str(path)}
    if flag == "distill_pretrained":
        changes["distill_model"] = "toy-vit"
    with pytest.raises(SetupError, match=r"could run code|cannot be built"):
        build_both(make_config(tmp_path, **changes), reference)


def test_numpy_weights_run_nothing(tmp_path: Path, mark: Path) -> None:
    np.savez(tmp_path / "weights.npz", x=np.array([Payload(mark)], dtype=object))
    with pytest.raises(SetupError):
        build_model(make_config(tmp_path, pretrained=str(tmp_path / "weights.npz")), World())


def test_a_library_that_trusts_weights_is_not_let(tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "tower.bin", Payload(mark), "zip")

    def trusting(*words: object, **options: object) -> None:
        torch.load(tmp_path / "tower.bin", weights_only=False)

    monkeypatch.setattr(open_clip, "create_model_and_transforms", trusting)
    before = dict(os.environ)
    with pytest.raises(SetupError, match="could run code"):
        build_model(make_config(tmp_path), World())
    assert dict(os.environ) == before


@pytest.mark.parametrize("place", ["registry", "local-dir"])
def test_a_configuration_cannot_have_a_tokenizer_run_code(tmp_path: Path, place: str) -> None:
    text = TEXT | {"hf_tokenizer_name": "org/name", "tokenizer_kwargs": {"trust_remote_code": True}}
    content = {"embed_dim": 16, "vision_cfg": VIT, "text_cfg": text}
    folder = tmp_path / "configs"
    folder.mkdir()
    if place == "registry":
        (folder / "hostile.json").write_text(json.dumps(content))
        config = make_config(folder, model="hostile")
    else:
        (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": content}))
        config = make_config(tmp_path, model=f"local-dir:{folder}")
    with pytest.raises(SetupError, match="trust_remote_code"):
        build_model(config, World())


# ---- only the command line runs commands


def test_a_command_of_the_command_line_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So the tests below would notice."""
    monkeypatch.setenv("OWNED", str(tmp_path / "wanted"))
    cli.main(arguments(tmp_path, COMMAND, train_num_samples=100, epochs=1))
    assert (tmp_path / "wanted").is_dir()


def test_files_that_look_like_commands_are_files(tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "data"
    make_shards(folder, [40, 40, 40])
    names = [COMMAND, "http:x.tar", "file:x.tar"]
    for old, new in zip(sorted(folder.glob("*.tar")), names, strict=True):
        old.rename(folder / new)
    monkeypatch.chdir(folder)
    assert expand("*.tar") == [sorted((f"./{name}" for name in names), key=lambda name: name)]
    assert cli.main(arguments(tmp_path, "*.tar", epochs=1, batch_size=40)) == 0


@pytest.mark.parametrize("name", ["sizes.json", "_info.json"])
def test_names_in_files_of_sizes_are_only_compared(tmp_path: Path, mark: Path, name: str) -> None:
    folder = tmp_path / "data"
    data = make_shards(folder, [40, 40])
    sizes = {"train-000.tar": 40, COMMAND: 7, "../../train-000.tar": 9, str(tmp_path / "x.tar"): 3}
    lists = {"filenames": [*sizes], "shard_lengths": [*sizes.values()], "name": "train"}
    (folder / name).write_text(json.dumps(sizes if name == "sizes.json" else {"splits": {"train": lists}}))
    before = everything(tmp_path)
    assert cli.main(arguments(tmp_path, data, epochs=1, batch_size=40)) == 0
    assert everything(tmp_path) - before <= {"data/sizes.json", *everything_below(tmp_path, "logs", "configs")}


def everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def everything_below(folder: Path, *names: str) -> set[str]:
    return {path for path in everything(folder) if path.split("/")[0] in names}


def test_cells_of_a_table_are_paths_of_files(tmp_path: Path, mark: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "good.png").write_bytes(image_bytes(3))
    (tmp_path / "fifo").mkdir()
    cells = [
        COMMAND,
        f"|mkdir {mark}",
        f"file://{tmp_path}/good.png",
        "http://127.0.0.1:9/x.png",
        "/dev/zero",
        "/dev/stdin",
    ]
    rows = [f"{tmp_path}/good.png\ta picture {number}" for number in range(40)] + [f"{cell}\tx" for cell in cells]
    (tmp_path / "train.tsv").write_text("filepath\ttitle\n" + "\n".join(rows) + "\n")
    words = arguments(tmp_path, f"{tmp_path}/train.tsv", epochs=1, batch_size=40, max_skip_fraction=1)
    assert cli.main(words) == 0
    assert "6 no_image" in caplog.text


@pytest.mark.parametrize("content", ["pipe:echo 1", "../../x", "1; echo", "²", "9" * 30])
def test_a_number_of_shards_is_a_number(tmp_path: Path, mark: Path, content: str) -> None:
    folder = tmp_path / "benchmark"
    (folder / "test").mkdir(parents=True)
    (folder / "test" / "nshards.txt").write_text(content.replace("echo", f"mkdir {mark}"))
    assert cli.main(arguments(tmp_path, make_shards(tmp_path / "data", [100]), val_data=folder, epochs=1)) == 2


# ---- names and captions of the data stay what they are


def hostile_shard(path: Path, mark: Path) -> Path:
    """Samples with keys and captions that lead elsewhere or talk to a terminal, half of them damaged."""
    keys = [
        "../../up",
        str(path.parent / "absolute"),
        f"{ESCAPES}key",
        "a\nb",
        COMMAND.replace(".tar", ""),
        "\udcff",
    ]
    captions = [ESCAPES, "a\n2025-01-01,00:00:00 | INFO | forged", f"$(mkdir {mark})", "{c}%s{0}", "../../etc/passwd"]
    samples = {}
    for number in range(60):
        key = f"{keys[number % len(keys)]}{number}"
        good = sample(number, txt=captions[number % len(captions)].encode())
        samples[key] = good if number % 2 else good | {"png": ESCAPES.encode(), "txt": b"\xff" + ESCAPES.encode()}
    return make_shard(path, samples)


def test_a_run_on_hostile_data_says_and_writes_nothing_raw(
    tmp_path: Path, mark: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shard = hostile_shard(tmp_path / "data" / f"{ESCAPES}.tar", mark)
    before = everything(tmp_path)
    words = arguments(
        tmp_path, str(shard), epochs=1, batch_size=20, max_skip_fraction=1, val_data=shard, record=True, workers=1,
        **selection("clipscore"),
    )  # fmt: skip
    assert cli.main(words) == 0
    assert everything(tmp_path) - before <= {"data/sizes.json", *everything_below(tmp_path, "logs", "configs")}
    run = tmp_path / "logs" / "run"
    texts = {path: path.read_text() for path in run.rglob("*") if path.suffix in (".log", ".jsonl", ".json")}
    assert len(texts) >= 4
    said = capfd.readouterr()
    assert r"\x1b[2J" in said.err  # something was quoted
    for text in [*texts.values(), said.out, said.err]:
        assert all(character.isprintable() or character == "\n" for character in text.replace("\t", ""))
        assert "\n2025-01-01" not in text
    assert all(name.isprintable() and "up" not in name for name in everything(run))


def test_an_error_that_quotes_the_data_is_printable(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / f"{ESCAPES}.tar").write_bytes(bytes(1024))
    assert cli.main(arguments(tmp_path, f"{tmp_path}/*.tar")) == 2
    said = capfd.readouterr().err
    assert "error: --train-data: 1 of 1 shards are empty" in said
    assert all(character.isprintable() or character in "\n\t" for character in said)


def test_a_checkpoint_reads_scores_from_its_own_folder_only(tmp_path: Path) -> None:
    data = make_shards(tmp_path / "data", [100])
    path = train(tmp_path, data, epochs=1, **selection("historical_base_sampling")) / "checkpoints" / "epoch_1.pt"
    content = torch.load(path, weights_only=True)
    path.with_name(content["dissect"]["scores_file"]).rename(tmp_path / "elsewhere.safetensors")
    content["dissect"]["scores_file"] = "../../../elsewhere.safetensors"
    torch.save(content, path)
    with pytest.raises(SetupError, match="which is no file beside it"):
        load_checkpoint(path)
