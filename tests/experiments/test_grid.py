"""Grids are read from YAML: what is wrong is found before anything runs, and named."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT
from grids import CONTENT, make_grid, run, write_grid

from dissect_clip.errors import SetupError
from experiments.collect import published_figures
from experiments.grid import Grid
from experiments.grid_file import read_grid
from experiments.metrics import METRICS
from experiments.moved import moved
from experiments.published import read_published
from experiments.recorded import check_recorded, read_recorded
from experiments.tables import FORMATS, as_markdown, make_tables

SET = CONTENT["data_sets"]["set"]
GIVEN = dict.fromkeys(("CC3M", "CC12M", "YFCC15M", "COCO", "FLICKR", "EMOJI", "LISTS"), "/data")
EXPERIMENTS = ROOT / "experiments"
GRIDS = sorted(EXPERIMENTS.glob("*/*/*.yaml"))
PUBLISHED = sorted((EXPERIMENTS / "paper" / "published").glob("*.csv"))


def test_the_cells_are_all_combinations(tmp_path: Path):
    noisy = {"set": {**SET, "noise": {0.4: "list.csv"}}}
    grid = make_grid(tmp_path, data_sets=noisy, noise=[0, 0.4], rates=[0.3, 0.5], seeds=[0, 1])
    keys = list(grid.cell_keys())
    assert len(keys) == len(set(keys)) == 2 * 2 * (1 + 3 * 2)
    assert {key.rate for key in keys if key.method == "All data"} == {None}
    assert keys[0].seed == 0
    assert [key.seed for key in keys] == sorted(key.seed for key in keys)
    assert len({key.name for key in keys}) == len(keys)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sedes": [0]}, "'sedes' is unknown; the keys are title, data_sets"),
        ({"title": None}, "'title' is missing"),
        ({"rates": [0.3, 1.5]}, "rates: 1.5 must be above 0 and at most 1"),
        ({"rates": ["a"]}, "rates: ['a'] is not a list of numbers"),
        ({"rates": []}, "rates: the list is empty"),
        ({"seeds": [0, 0]}, "seeds: 0 appears twice"),
        ({"seeds": [True]}, "seeds: [True] is not a list of whole numbers"),
        ({"noise": [0.2]}, "noise: 0.2 has no list in data_sets: set: noise"),
        ({"rows": ["Random", "Rondom"]}, "rows: 'Rondom' is unknown; there are All data, Random"),
        ({"train_on": ["sets"]}, "train_on: 'sets' is unknown; there are set"),
        ({"plots": ["pies"]}, "plots: 'pies' is unknown; there are rates, noise, curves"),
        ({"flags": "--seed 3"}, "flags: --seed is set by the grid, from seeds"),
        ({"flags": "--name=x"}, "flags: --name=x is set by the grid, from the cell"),
        ({"flags": "--lr '1"}, "No closing quotation"),
        ({"methods": {"A": {"flags": "--select-rate 1"}}}, "methods: A: flags: --select-rate is set by the grid"),
        ({"methods": {"A": {"strategies": "random"}}}, "methods: A: 'strategies' is unknown"),
        ({"methods": {"A": None}}, "methods: A: None is not a mapping"),
        ({"data_sets": {"set": {**SET, "val": {}}}}, "data_sets: set: val is empty"),
        ({"data_sets": {"set": {**SET, "train": 3}}}, "data_sets: set: train: 3 is not a text"),
        ({"tables": [{"title": "T", "metrics": ["speed"]}]}, "'speed' is unknown; there are i2t_r1"),
        ({"tables": [{"title": "T", "metrics": []}]}, "metrics: the list is empty"),
        ({"tables": [{"title": "T", "metrics": ["rsum"]}] * 2}, "two tables have the same title"),
        ({"tables": [{"title": "T", "metrics": ["rsum"], "also": ["X"]}]}, "also and published_for need published"),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(SetupError) as error:
        make_grid(tmp_path, **changes)
    assert message in str(error.value)
    assert "grid.yaml" in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "a grid is a mapping"),
        ("a: [", "is not YAML"),
        ("title: a\ntitle: b\n", "line 2: 'title' appears twice"),
        ("methods:\n  A: {}\n  A: {}\n", "line 3: 'A' appears twice"),
        ("title: !!python/object/apply:os.getcwd []\n", "is not YAML"),
        ("base: 3\n", "base: 3 is not a text"),
        ("base: nowhere.yaml\n", "cannot read"),
    ],
)
def test_files_that_are_no_grids(text: str, message: str, tmp_path: Path):
    file = tmp_path / "grid.yaml"
    file.write_text(text)
    with pytest.raises(SetupError) as error:
        read_grid(file, {})
    assert message in str(error.value)


def test_a_file_stands_over_its_base(tmp_path: Path):
    write_grid(tmp_path, "below")
    file = tmp_path / "grid.yaml"
    file.write_text(yaml.safe_dump({"base": "below.yaml", "rows": ["DISSect"], "seeds": [7]}))
    grid = read_grid(file, {})
    assert (list(grid.methods), grid.seeds, grid.rates) == (["DISSect"], [7], [0.3])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"flags": "--epochs 4 --no-such-flag"}, "All data on set, seed 0: unrecognized arguments: --no-such-flag"),
        ({"flags": "--epochs none"}, "invalid int value: 'none'"),
        ({"methods": {"A": {"strategy": "best"}}}, "'best'"),
        ({"methods": {"A": {"strategy": "warmup_base_sampling"}}}, "--warmup-point 10 leaves no epoch"),
        ({"methods": {"A b": {}, "A-b": {}}}, "would both be called set-A-b-seed0"),
    ],
)
def test_flags_of_all_cells_are_checked(changes: dict[str, Any], message: str, tmp_path: Path):
    grid = make_grid(tmp_path, **changes)
    with pytest.raises(SetupError) as error:
        grid.check(list(grid.cell_keys()))
    assert message in str(error.value)


def test_variables_are_filled_and_missing_ones_named(tmp_path: Path):
    file = write_grid(tmp_path)
    assert read_grid(file, {"FOLDER": "/x"}).data_sets["set"].train == "/x/train.tar"
    grid = read_grid(file, {})
    assert grid.variables == {"FOLDER"}
    with pytest.raises(SetupError, match="needs --data FOLDER"):
        grid.check(list(grid.cell_keys()))
    assert read_grid(file, {"FOLDER": "${OTHER}"}).data_sets["set"].train == "${OTHER}/train.tar"


def test_shards_with_wrong_captions_are_written_once(tmp_path: Path):
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        for key in ("k0", "k1", "k2"):
            info = tarfile.TarInfo(f"{key}.txt")
            info.size = 2
            tar.addfile(info, io.BytesIO(key.encode()))
    data = {"set": {**SET, "noise": {0.4: "${FOLDER}/list.csv"}}}
    grid, runs = make_grid(tmp_path, data_sets=data, noise=[0, 0.4]), tmp_path / "runs"
    noisy = [key for key in grid.cell_keys() if key.noise]
    with pytest.raises(SetupError, match="there is no file"):
        grid.prepare(noisy, runs)
    (tmp_path / "list.csv").write_text("key,donor\nk0,k1\nk1,k0\n")
    grid.prepare(noisy, runs)
    shard = runs / "shards-set-noise0.4" / "00000.tar"
    with tarfile.open(shard) as tar:
        found = {m.name: (tar.extractfile(m) or io.BytesIO()).read() for m in tar}
    assert found == {"k0.txt": b"k1", "k1.txt": b"k0", "k2.txt": b"k2"}
    written = shard.stat().st_mtime_ns
    grid.prepare(noisy, runs)
    assert shard.stat().st_mtime_ns == written
    cell = grid.cell(noisy[0], runs)
    assert cell.words[:2] == ("--train-data", f"{runs}/shards-set-noise0.4/*.tar")
    assert cell.command[:4] == ("--train-data", f"{tmp_path}/train.tar", "--noise-list", f"{tmp_path}/list.csv")


def test_only_the_lists_that_are_used_need_a_value(tmp_path: Path):
    data = {"set": {**SET, "noise": {0.4: "${LISTS}/list.csv"}}}
    grid = make_grid(tmp_path, data_sets=data, noise=[0, 0.4])
    clean, noisy = ([key for key in grid.cell_keys() if bool(key.noise) is wanted] for wanted in (False, True))
    grid.check(clean)
    with pytest.raises(SetupError, match="needs --data LISTS="):
        grid.check([*clean, *noisy])


def test_a_method_whose_flags_were_removed_is_not_run_but_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    methods = CONTENT["methods"] | {"Old": {"strategy": "random", "flags": "--no-such-flag 1", "commit": "abc1234"}}
    recorded = {"flags": "--epochs 4 --batch-size 8 --no-such-flag 1 --select --select-strategy random "}
    file = write_grid(tmp_path, methods=methods, rows=["All data", "Old"], seeds=[0])
    assert run(tmp_path, "--list", file=file) == 2
    assert "Old cannot be run here: flags of it were removed after commit abc1234" in capsys.readouterr().err
    assert run(tmp_path, "--rows", "All data", file=file) == 0
    line = json.loads((tmp_path / "runs" / "results" / "grid.jsonl").read_text())
    recorded["flags"] += "--select-rate 0.3 --record --seed 0"
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "old.jsonl").write_text(json.dumps(line | {"method": "Old", "rate": 0.3} | recorded) + "\n")
    assert run(tmp_path, "--from", str(tmp_path / "old"), file=file) == 0
    assert "| Old | missing" not in (tmp_path / "runs" / "results" / "grid.md").read_text()
    assert run(tmp_path, "--from", str(tmp_path / "old"), "--list", file=file) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "2 cells: 2 done"


# ---- the grids of the project


def grid_of(file: Path) -> Grid:
    return read_grid(file, GIVEN)


ROWS = [(file, name) for file in GRIDS for name, method in grid_of(file).methods.items() if method.commit is None]


def test_there_are_grids():
    names = {
        "paper": ["cc3m", "cc12m", "yfcc15m", "ratio_sweep", "wall_clock", "noise"],
        "small": [
            "methods", "rates", "noise", "wall_clock", "warmups", "clean_posterior", "clean_ablation", "clean_noise",
            "clean_kinds", "clean_rates", "clean_vit",
        ],
    }  # fmt: skip
    expected = {EXPERIMENTS / folder / name / f"{name}.yaml" for folder, found in names.items() for name in found}
    assert set(GRIDS) == expected


@pytest.mark.parametrize(("file", "row"), ROWS, ids=lambda value: value.stem if isinstance(value, Path) else value)
def test_the_flags_of_every_row_are_known(file: Path, row: str):
    grid = grid_of(file)
    strategy = grid.methods[row].strategy
    keys = [key for key in grid.cell_keys() if key.method == row]
    grid.check(keys)
    assert {grid.config(key).selection.select for key in keys} == {strategy is not None}


def test_the_grid_of_the_documentation_can_be_read(tmp_path: Path):
    text = (ROOT / "docs" / "guides" / "reproduce.md").read_text().split("```yaml\n")[1].split("```")[0]
    file = tmp_path / "grid.yaml"
    file.write_text(text.replace("../../base/", f"{EXPERIMENTS}/base/"))
    grid = grid_of(file)
    assert grid.methods["Mine"].strategy == "margin"
    assert grid.flags


@pytest.mark.parametrize("file", GRIDS, ids=lambda file: f"{file.parent.parent.name}-{file.stem}")
def test_the_published_names_of_every_grid_are_there(file: Path):
    published_figures(grid_of(file))


@pytest.mark.parametrize("folder", ["paper", "small"])
def test_grids_of_a_folder_share_cells(folder: str, tmp_path: Path):
    cells: dict[str, Any] = {}
    for file in [file for file in GRIDS if file.parent.parent.name == folder]:
        grid = grid_of(file)
        for key in grid.cell_keys():
            if not grid.is_retired(key):
                cell = grid.cell(key, tmp_path)
                assert cells.setdefault(cell.name, cell) == cell


@pytest.mark.parametrize("file", PUBLISHED, ids=lambda file: file.stem)
def test_published_tables_can_be_read(file: Path):
    assert read_published(file).rows


def test_published_sums_are_those_of_the_paper_page():
    """Zhao et al.: COCO R@Sum of full data, of DISSect-Warmup and of random selection, trained on CC3M."""
    found = read_published(EXPERIMENTS / "paper" / "published" / "retrieval.csv")
    told = {"CLIP": [140.37], "DISSect-Warmup": [141.59, 148.44, 148.01], "Random": [131.18, 134.30, 137.48]}
    for method, sums in told.items():
        percents = [100] if method == "CLIP" else [30, 50, 70]
        ours = [found.find("rsum4", "cc3m", "coco5k", [method], percent) for percent in percents]
        assert ours == pytest.approx(sums, abs=0.005)


def test_published_tables_need_known_columns(tmp_path: Path):
    file = tmp_path / "p.csv"
    file.write_text("train_set,benchmark,method,speed\n")
    with pytest.raises(SetupError, match="no column select_percent"):
        read_published(file)
    file.write_text("train_set,benchmark,method,select_percent,speed\n")
    with pytest.raises(SetupError, match="'speed' is not a metric"):
        read_published(file)
    assert "rsum4" in METRICS


def test_published_names_that_are_nowhere_are_errors(tmp_path: Path):
    (tmp_path / "p.csv").write_text("train_set,benchmark,method,select_percent,rsum4\nset,one,CLIP,100,5\n")
    table = {"title": "T", "metrics": ["rsum4"], "published": "p.csv"}
    with pytest.raises(SetupError, match="methods: Random: published: Random stands in no table"):
        published_figures(make_grid(tmp_path, tables=[table]))
    methods = {"All data": {"published": ["CLIP"]}}
    with pytest.raises(SetupError, match="also: 'Else' does not stand in"):
        published_figures(make_grid(tmp_path, methods=methods, tables=[{**table, "also": ["Else"]}]))


RECORDED = [file for file in GRIDS if file.with_suffix(".jsonl").exists()]


@pytest.mark.parametrize("file", RECORDED, ids=lambda file: file.stem)
def test_the_tables_of_every_grid_are_those_of_its_recorded_runs(file: Path):
    grid, runs = grid_of(file), read_recorded([file.parent])
    check_recorded(grid, list(grid.cell_keys()), runs)
    assert set(runs) == set(grid.cell_keys())
    tables = list(make_tables(grid, runs, published_figures(grid)))
    assert tables
    for table in tables:
        for ending, text in FORMATS.items():
            assert (file.parent / f"{table.name}.{ending}").read_text() == text(table)
        assert as_markdown(table) in file.with_suffix(".md").read_text()


@pytest.mark.parametrize(
    ("old", "now"),
    [
        ("configs/small/rates.yaml", "small/rates/rates.yaml"),
        (str(ROOT / "configs/paper/cc3m.yaml"), "paper/cc3m/cc3m.yaml"),
        ("docs/results/small", "small"),
    ],
)
def test_paths_of_earlier_versions_are_found(old: str, now: str, capsys: pytest.CaptureFixture[str]):
    assert moved(Path(old)) == EXPERIMENTS / now
    assert now in capsys.readouterr().err
    for other in ("configs/small/mine.yaml", "mine/rates.yaml"):
        assert moved(Path(other)) == Path(other)
    assert not capsys.readouterr().err


def test_the_script_of_earlier_versions_still_runs_grids(tmp_path: Path):
    words = ["configs/small/rates.yaml", "--collect", "--from", "docs/results/small", "--out", str(tmp_path)]
    done = subprocess.run([sys.executable, "scripts/reproduce.py", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    recorded = EXPERIMENTS / "small" / "rates"
    for ending in ("md", "jsonl"):
        assert (tmp_path / f"rates.{ending}").read_text() == (recorded / f"rates.{ending}").read_text()
