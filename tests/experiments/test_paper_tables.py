"""Tables follow from runs and published figures; numbers are worked out by hand."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from grids import make_grid

from dissect_clip.errors import SetupError
from experiments.cells import CellKey
from experiments.collect import clean_share, collect, page, published_figures, read_run
from experiments.grid import Grid
from experiments.metrics import METRICS, Peers
from experiments.results import Run, make_run
from experiments.tables import Table, as_csv, as_latex, as_markdown, make_tables

ALL, RANDOM, DISSECT = "All data", "Random", "DISSect"


def run(method: str, seed: int = 0, rsum4: Any = (40.0, 80.0), seconds: Any = (50.0, 100.0), **more: Any) -> Run:
    """A run whose four recalls are a quarter of its R@Sum each; R@5 is 1."""
    key = CellKey("set", more.pop("noise", 0.0), method, None if method == ALL else more.pop("rate", 0.3), seed)
    recalls = {f"{way}_r{k}": rsum4[-1] / 4 if k != 5 else 1.0 for way in ("i2t", "t2i") for k in (1, 5, 10)}
    count = len(rsum4)
    facts = {"trained": [10] * count, "scored": [0] * count, "score_seconds": [s / 5 for s in seconds], **more}
    final = {"one": recalls, "two": recalls}
    return Run(key, list(range(1, count + 1)), list(rsum4), seconds=list(seconds), final=final, **facts)


def only_sheet(grid: Grid, runs: list[Run]) -> Table:
    found = make_tables(grid, {run.key: run for run in runs}, published_figures(grid))
    return next(iter(found))


def make_table(folder: Path, *metrics: str, published: str = "", **changes: Any) -> Grid:
    table: dict[str, Any] = {"title": "T", "metrics": list(metrics)}
    if published:
        (folder / "p.csv").write_text(published)
        table["published"] = "p.csv"
    methods = {ALL: {"published": ["CLIP"]}, RANDOM: {"strategy": "random"}, DISSECT: {"strategy": "small_loss"}}
    return make_grid(folder, **{"methods": methods, "tables": [table], **changes})


def test_recalls_and_sums_come_from_the_results(tmp_path: Path):
    names = ["image_to_text_R@1", "image_to_text_R@5", "image_to_text_R@10"]
    names += ["text_to_image_R@1", "text_to_image_R@5", "text_to_image_R@10"]
    row = {name: (place + 1) / 100 for place, name in enumerate(names)}
    row |= {"epoch": 3, "trained": 9, "scored": 12, "rsum": 21.0}
    row |= {"load_seconds": 1.0, "score_seconds": 2.0, "train_seconds": 4.0, "optimizer_seconds": 8.0}
    found = make_run(CellKey("set", 0, ALL, None, 0), [row], {}, "one", None)
    assert (found.rsum4, found.seconds, found.score_seconds) == ([1 + 3 + 4 + 6], [15], [2])
    value = {name: METRICS[name].value(found, Peers(None, None), "one") for name in METRICS}
    assert value["rsum4"] == pytest.approx(14)
    assert value["rsum"] == pytest.approx(row["rsum"])
    assert value["t2i_r5"] == pytest.approx(5)
    assert (value["seconds_to_end"], value["seconds_to_end_without_scoring"]) == (15, 13)
    assert value["hours_to_end"] == pytest.approx(15 / 3600)
    assert METRICS["rsum4"].value(found, Peers(None, None), "other") is None


def test_moments_of_a_run():
    full, random = run(ALL, rsum4=[20, 60, 50], seconds=[10, 20, 30]), run(RANDOM, rsum4=[10, 45, 40])
    ours = run(DISSECT, rsum4=[30, 48, 70, 65], seconds=[4, 8, 12, 16])
    value = {name: METRICS[name].value(ours, Peers(full, random), "one") for name in METRICS}
    assert value["seconds_to_random_best"] == 8  # 48 is the first of at least 45
    assert value["seconds_to_random_best_without_scoring"] == pytest.approx(8 - 8 / 5)
    assert value["seconds_to_all_data"] == 12  # the first of at least 50
    assert value["seconds_to_own_best"] == 12
    assert value["time_share_to_random_best"] == pytest.approx(100 * 8 / 30)
    assert value["time_share_to_random_best_without_scoring"] == pytest.approx(100 * 8 / 30)
    assert value["rsum4_share"] == pytest.approx(100 * 65 / 50)
    assert METRICS["seconds_to_all_data"].value(random, Peers(full, random), "one") is None
    alone = Peers(None, None)
    assert all(METRICS[name].value(ours, alone, "one") is None for name in ("rsum4_share", "seconds_to_all_data"))


def test_mean_deviation_published_and_difference(tmp_path: Path):
    published = "train_set,benchmark,method,select_percent,rsum4\nset,one,CLIP,100,70.5\nset,one,Small,30,90\n"
    methods = {ALL: {"published": ["CLIP"]}, DISSECT: {"strategy": "small_loss", "published": ["Other", "Small"]}}
    grid = make_table(tmp_path, "rsum4", published=published, methods=methods)
    runs = [run(ALL, 0, [60.0]), run(ALL, 1, [70.0]), run(ALL, 2, [80.0]), run(DISSECT, 1, [100.0])]
    table = only_sheet(grid, runs)
    ((_, (full,)), (_, (ours,))) = table.rows
    assert (full.mean, full.deviation, full.difference) == (70, 10, pytest.approx(-0.5))
    assert (ours.mean, ours.deviation, ours.difference) == (100, None, 10)
    assert as_markdown(table).splitlines() == [
        "| R@Sum (1, 10) | 30 % |",
        "| --- | --: |",
        "| All data | 70.00 ± 10.00 [70.50, -0.50] |",
        "| DISSect | 100.00 (1 of 3) [90.00, +10.00] |",
    ]
    rows = list(csv.DictReader(io.StringIO(as_csv(table))))
    assert [row["mean"] for row in rows] == ["70.000", "100.000"]
    assert [row["deviation"] for row in rows] == ["10.000", ""]
    assert r"All data & 70.00 $\pm$ 10.00 [70.50, -0.50] \\" in as_latex(table)


def test_one_seed_shows_no_spread_and_missing_cells_are_told(tmp_path: Path):
    grid = make_table(tmp_path, "rsum4", "seconds_to_random_best", seeds=[0])
    lines = as_markdown(only_sheet(grid, [run(ALL), run(DISSECT, rsum4=[1.0, 2.0])])).splitlines()
    assert lines[2:] == [
        "| All data | 80.00 | – |",
        "| Random | missing | missing |",
        "| DISSect | 2.00 | – |",
    ]


def test_columns_are_noise_times_rates_times_metrics(tmp_path: Path):
    data = {"set": {"train": "t.tar", "val": {"one": "v.tar"}, "noise": {0.4: "l.csv"}}}
    grid = make_table(tmp_path, "rsum4", "trained", data_sets=data, noise=[0, 0.4], rates=[0.3, 0.5], seeds=[0])
    runs = [run(ALL), run(DISSECT, noise=0.4, rate=0.5, rsum4=[7.0])]
    table = only_sheet(grid, runs)
    assert [(c.noise, c.rate, c.metric) for c in table.columns] == [
        (n, r, m) for n in (0, 0.4) for r in (0.3, 0.5) for m in ("rsum4", "trained")
    ]
    text = as_markdown(table).splitlines()
    assert text[0].startswith("| method | 0 % wrong captions, 30 %: R@Sum (1, 10) | 0 % wrong captions, 30 %: pairs")
    assert text[2].count("80.00") == 2  # all data stands at both rates
    assert text[4].split(" | ")[-2:] == ["7.00", "10 |"]
    assert r"\multicolumn{2}{c}{40 \% wrong captions, 50 \%}" in as_latex(table)


def test_a_table_for_each_benchmark_where_that_matters(tmp_path: Path):
    grid = make_table(tmp_path, "rsum4")
    assert [table.name for table in make_tables(grid, {}, {})] == ["grid-table1-one", "grid-table1-two"]
    grid = make_table(tmp_path, "hours_to_end")
    assert [table.name for table in make_tables(grid, {}, {})] == ["grid-table1"]


def test_published_shares_are_of_published_all_data(tmp_path: Path):
    published = (
        "train_set,benchmark,method,select_percent,i2t_r1,i2t_r10,t2i_r1,t2i_r10,hours_to_end_without_scoring,"
        "hours_to_random_best_without_scoring\n"
        "cc3m,coco,CLIP,100,1,2,3,4,60,\ncc3m,coco,Ours,30,2,3,4,6,,15\n"
    )
    (tmp_path / "p.csv").write_text(published)
    metrics = ["rsum4_share", "time_share_to_random_best_without_scoring", "time_share_to_random_best"]
    table = {"title": "T", "metrics": metrics, "published": "p.csv", "published_for": "cc3m/coco"}
    methods = {ALL: {"published": ["CLIP"]}, "X": {"strategy": "random", "published": ["Ours"]}}
    grid = make_grid(tmp_path, methods=methods, tables=[table])
    (_, _), (_, entries) = only_sheet(grid, []).rows
    assert [entry.published for entry in entries] == [pytest.approx(150), pytest.approx(25), None]


def test_rows_that_are_published_only(tmp_path: Path):
    (tmp_path / "p.csv").write_text("train_set,benchmark,method,select_percent,rsum4\nset,one,Else,30,50\n")
    table = {"title": "T", "metrics": ["rsum4"], "published": "p.csv", "also": ["Else"]}
    grid = make_grid(tmp_path, methods={ALL: {}}, tables=[table])
    assert as_markdown(only_sheet(grid, [])).splitlines()[-1] == "| Else (published only) | – [50.00] |"


def test_latex_escapes_what_it_would_read():
    grid_title = "50 % & _x_ {#} ~^\\"
    table = Table("n", grid_title, [], [], False)
    line = next(line for line in as_latex(table).splitlines() if line.startswith(r"\caption"))
    assert r"50 \% \& \_x\_ \{\#\} \textasciitilde{}\textasciicircum{}\textbackslash{}" in line


def test_differences_of_nothing_have_no_minus(tmp_path: Path):
    published = "train_set,benchmark,method,select_percent,rsum4\nset,one,CLIP,100,80.001\n"
    grid = make_table(tmp_path, "rsum4", published=published, methods={ALL: {"published": ["CLIP"]}}, seeds=[0])
    assert as_markdown(only_sheet(grid, [run(ALL)])).splitlines()[-1] == "| All data | 80.00 [80.00, +0.00] |"


# ---- run folders


def write_run(folder: Path, name: str, rows: list[dict[str, Any]], status: int = 0, flags: Sequence[str] = ()) -> None:
    (folder / name / "checkpoints").mkdir(parents=True)
    (folder / name / "checkpoints" / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    note = {"command": ["--val-data", "v.tar", *flags], "status": status}
    (folder / f"{name}.json").write_text(json.dumps(note))


def test_only_finished_runs_with_evaluations_count(tmp_path: Path):
    grid = make_table(tmp_path, "rsum4")
    key = next(grid.cell_keys())
    assert read_run(grid, key, tmp_path) is None
    write_run(tmp_path, key.name, [{"epoch": 1, "imagenet-zeroshot-val-top1": 0.5}], status=1)
    assert read_run(grid, key, tmp_path) is None
    (tmp_path / f"{key.name}.json").write_text(json.dumps({"command": ["--val-data", "v.tar"], "status": 0}))
    with pytest.raises(SetupError, match="no evaluation of retrieval"):
        read_run(grid, key, tmp_path)


def noisy_grid(folder: Path) -> Grid:
    """Three of ten captions are another's."""
    data = {"set": {"train": "t.tar", "val": {"one": "v.tar"}, "noise": {0.3: "l.csv"}}}
    methods = {ALL: {}, DISSECT: {"strategy": "warmup_base_sampling", "flags": "--warmup-point 1"}}
    grid = make_grid(folder, data_sets=data, noise=[0.3], methods=methods)
    shards = grid.shards(next(grid.cell_keys()), folder)
    shards.mkdir()
    with tarfile.open(shards / "00000.tar", "w") as tar:
        for number in range(10):
            for ending in ("png", "txt"):
                tar.addfile(tarfile.TarInfo(f"k{number}.{ending}"))
    note = json.dumps([["t.tar"], "key,donor\nk0,k1\nk1,k2\nk2,k0\n"])
    shards.with_name(f"{shards.name}.json").write_text(note)
    return grid


def test_the_clean_share_is_that_of_what_was_selected_after_the_warm_up(tmp_path: Path):
    grid = noisy_grid(tmp_path)
    full, ours = [next(p for p in grid.cell_keys() if p.method == method) for method in (ALL, DISSECT)]
    assert clean_share(grid, full, tmp_path) == pytest.approx(70)
    assert clean_share(grid, ours, tmp_path) is None
    record = tmp_path / ours.name / "record"
    record.mkdir(parents=True)
    kept = [{0, 1, 2}, {0, 3, 4, 5}, {1, 2, 5, 6}]  # by epoch; the first is the warm-up
    for epoch, chosen in enumerate(kept):
        table = pa.table({"key": [f"k{n}" for n in range(10)], "selected": [n in chosen for n in range(10)]})
        pq.write_table(table, record / f"epoch_{epoch:05d}.parquet")
    assert clean_share(grid, ours, tmp_path) == pytest.approx(100 * 5 / 8)
    assert clean_share(grid, CellKey("set", 0, DISSECT, 0.3, 0), tmp_path) is None


def test_collecting_twice_writes_the_same(tmp_path: Path):
    """Also with plots of every kind, and none of what no run is there for."""
    data = {"set": {"train": "t.tar", "val": {"one": "v.tar"}, "noise": {0.4: "l.csv"}}}
    grid = make_table(tmp_path, "rsum4", data_sets=data, noise=[0, 0.4], rates=[0.3, 0.5], seeds=[0, 1])
    empty = collect(grid, tmp_path / "runs", tmp_path / "empty")
    assert not [file for file in empty if file.suffix == ".png"]
    assert "0 of 20 runs are finished" in (tmp_path / "empty" / "grid.md").read_text()
    names = ["image_to_text_R@1", "image_to_text_R@5", "image_to_text_R@10"]
    names += ["text_to_image_R@1", "text_to_image_R@5", "text_to_image_R@10"]
    for place, key in enumerate(key for key in grid.cell_keys() if not key.noise):
        rows = [
            {**dict.fromkeys(names, 0.1 * epoch + 0.01 * place), "epoch": epoch, "trained": epoch, "scored": 0}
            | {f"{phase}_seconds": float(epoch) for phase in ("load", "score", "train", "optimizer")}
            for epoch in (1, 2)
        ]
        write_run(tmp_path / "runs", key.name, rows, flags=grid.training_flags(key))
    first, second = (collect(grid, tmp_path / "runs", tmp_path / name) for name in "ab")
    assert [file.read_bytes() for file in first] == [file.read_bytes() for file in second]
    assert {file.name for file in first if file.suffix == ".png"} == {
        "grid-rates.png", "grid-noise.png", "grid-curves-0.3.png", "grid-curves-0.5.png",
    }  # fmt: skip
    assert all("![" + file.stem in (tmp_path / "a" / "grid.md").read_text() for file in first if file.suffix == ".png")


def test_the_page_names_the_seeds(tmp_path: Path):
    assert "of seeds 0, 1, 2." in page(make_table(tmp_path, "rsum4"), {}, {}, [])
    assert "of seed 7." in page(make_table(tmp_path, "rsum4", seeds=[7]), {}, {}, [])
