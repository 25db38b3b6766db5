"""``dissect-clip evaluate``: the numbers of CLIP_benchmark, in its files, for every data set that can be read."""

import importlib.util
import json
import math
import os
import re
import runpy
import sys
import threading
import warnings
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from benchmark_sets import (
    MODEL,
    command,
    image,
    labelled_set,
    labels,
    multilabel_set,
    random_weights,
    retrieval_set,
    write_classes,
    write_split,
)
from PIL import Image
from processes import Ranks
from runs import train
from shards_util import make_shards
from torch.utils.data import DataLoader

from dissect_clip.cli import main
from dissect_clip.cli.evaluate import parse_args
from dissect_clip.cli.exit_status import EXIT_SETUP, EXIT_TRAINING
from dissect_clip.cli.main import COMMANDS

ROOT = Path(__file__).resolve().parents[2]

needs_clip_benchmark = pytest.mark.skipif(
    importlib.util.find_spec("clip_benchmark") is None,
    reason="clip-benchmark is not installed: pip install --no-deps clip-benchmark==1.6.2",
)


def metrics(folder, name, task):
    return json.loads((folder / "results" / f"{name}_{task}.json").read_text())["metrics"]


# ---- as CLIP_benchmark


def benchmark_parts(weights, folder):
    """Model, loader and tokenizer as CLIP_benchmark's command line makes them for ``wds/``."""
    from clip_benchmark.datasets.builder import build_wds_dataset
    from clip_benchmark.models.open_clip import load_open_clip

    model, transform, tokenizer = load_open_clip(MODEL, weights, device="cpu")
    dataset = build_wds_dataset("toy", transform, "test", str(folder))
    return model.eval(), DataLoader(dataset.batched(4), batch_size=None), tokenizer, dataset


def benchmark_retrieval(weights, folder):
    from clip_benchmark.metrics import zeroshot_retrieval

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, loader, tokenizer, _ = benchmark_parts(weights, folder)
        return zeroshot_retrieval.evaluate(model, loader, tokenizer, "cpu", amp=False, recall_k_list=[1, 5, 10])


def benchmark_classification(weights, folder):
    """Its own numbers; with numpy from 2.4 on, where its ``accuracy`` fails, from its own logits."""
    from clip_benchmark.metrics import zeroshot_classification as theirs
    from sklearn.metrics import balanced_accuracy_score

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, loader, tokenizer, dataset = benchmark_parts(weights, folder)
        if np.lib.NumpyVersion(np.__version__) < "2.4.0":
            return theirs.evaluate(model, loader, tokenizer, dataset.classes, dataset.templates, "cpu", amp=False)
        classifier = theirs.zero_shot_classifier(model, tokenizer, dataset.classes, dataset.templates, "cpu", amp=False)
        logits, target = theirs.run_classification(model, classifier, loader, "cpu", amp=False)
    if target.dim() == 2:
        return {"mean_average_precision": theirs.average_precision_per_class(logits, target).mean().item()}
    right = logits.topk(min(5, logits.shape[1])).indices == target[:, None]
    return {
        "acc1": right[:, 0].double().mean().item(),
        "acc5": right.any(dim=1).double().mean().item() if len(dataset.classes) >= 5 else math.nan,
        "mean_per_class_recall": balanced_accuracy_score(target, logits.argmax(dim=1)),
    }


@needs_clip_benchmark
def test_retrieval_is_that_of_clip_benchmark(tmp_path):
    folder = retrieval_set(tmp_path / "set")
    assert main(command(tmp_path, folder)) == 0
    theirs = benchmark_retrieval(str(tmp_path / "weights.pt"), folder)
    assert metrics(tmp_path, "set", "zeroshot_retrieval") == pytest.approx(theirs, abs=1e-4)
    assert 0 < theirs["image_retrieval_recall@1"] < theirs["image_retrieval_recall@10"] < 1


@needs_clip_benchmark
@pytest.mark.parametrize("num_classes", [6, 4])
def test_classification_is_that_of_clip_benchmark(tmp_path, num_classes):
    folder = labelled_set(tmp_path / "set", 40, ["red ant", "bee", "cow", "dog", "elk", "fox"][:num_classes])
    assert main(command(tmp_path, folder)) == 0
    theirs = benchmark_classification(str(tmp_path / "weights.pt"), folder)
    ours = metrics(tmp_path, "set", "zeroshot_classification")
    assert ours == pytest.approx(theirs, abs=1e-4, nan_ok=True)
    assert math.isnan(ours["acc5"]) == (num_classes < 5)


@needs_clip_benchmark
def test_multilabel_precision_is_that_of_clip_benchmark(tmp_path):
    folder = multilabel_set(tmp_path / "set")
    assert main(command(tmp_path, folder)) == 0
    theirs = benchmark_classification(str(tmp_path / "weights.pt"), folder)
    assert metrics(tmp_path, "set", "zeroshot_classification") == pytest.approx(theirs, abs=1e-4)


@needs_clip_benchmark
def test_a_checkpoint_of_ours_evaluates_alike_in_both(tmp_path):
    run = train(tmp_path, make_shards(tmp_path / "data", [100]), epochs=1, batch_size=50)
    path = str(run / "checkpoints" / "epoch_1.pt")
    random_weights(tmp_path)  # whose configuration open_clip then knows
    retrieval, classes = retrieval_set(tmp_path / "pairs"), labelled_set(tmp_path / "pets")
    assert main(command(tmp_path, retrieval, classes, pretrained=path)) == 0
    assert metrics(tmp_path, "pairs", "zeroshot_retrieval") == pytest.approx(
        benchmark_retrieval(path, retrieval), abs=1e-4
    )
    assert metrics(tmp_path, "pets", "zeroshot_classification") == pytest.approx(
        benchmark_classification(path, classes), abs=1e-4
    )


def test_a_run_with_siglip_is_evaluated_with_siglip(tmp_path, capfd):
    run = train(tmp_path, make_shards(tmp_path / "data", [40]), epochs=1, siglip=True)
    random_weights(tmp_path)  # whose configuration is then known
    words = command(tmp_path, retrieval_set(tmp_path / "pairs"), pretrained=str(run / "checkpoints" / "epoch_1.pt"))
    assert main([*words, "--siglip"]) == 0
    assert "image_retrieval_recall@5" in metrics(tmp_path, "pairs", "zeroshot_retrieval")
    for prefix in ("", "file://"):
        words[words.index("--pretrained") + 1] = f"{prefix}{run}/checkpoints/epoch_1.pt"
        assert main([*words, "--overwrite"]) == EXIT_SETUP
        said = capfd.readouterr().err
        assert "flags that shape it such as --siglip, as in the training of these weights" in said
        assert "resume" not in said.lower()


def test_classification_by_an_independent_formula(tmp_path):
    assert main(command(tmp_path, labelled_set(tmp_path / "set", 40))) == 0
    model, _, transform = open_clip.create_model_and_transforms(MODEL, str(tmp_path / "weights.pt"))
    model.eval()
    tokenizer = open_clip.get_tokenizer(MODEL)
    names = (tmp_path / "set" / "classnames.txt").read_text().split("\n")[:-1]
    with torch.no_grad():
        columns = []
        for name in names:
            text = model.encode_text(tokenizer([f"a photo of a {name}.", f"the {name}!"]))
            columns.append(torch.nn.functional.normalize(text, dim=-1).mean(dim=0))
        classifier = torch.nn.functional.normalize(torch.stack(columns), dim=-1)
        pixels = torch.stack([transform(Image.open(BytesIO(image(number))).convert("RGB")) for number in range(40)])
        answer = (model.encode_image(pixels) @ classifier.T).argmax(dim=1)
    right = answer == torch.tensor(labels(40, 6))
    recalls = [right[torch.tensor(labels(40, 6)) == c].double().mean().item() for c in range(6)]
    ours = metrics(tmp_path, "set", "zeroshot_classification")
    assert ours["acc1"] == pytest.approx(right.double().mean().item())
    assert ours["mean_per_class_recall"] == pytest.approx(sum(recalls) / 6)


# ---- files


def test_a_result_has_clip_benchmarks_fields_in_a_file_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = command(tmp_path, labelled_set(tmp_path / "pets"))
    place = words.index("--output")
    assert main([*words[:place], *words[place + 4 :]]) == 0
    path = tmp_path / "results" / "pets_weights.pt_toy-vit_en_zeroshot_classification.json"
    result = json.loads(path.read_text())
    assert list(result) == ["dataset", "model", "pretrained", "task", "metrics", "language"]
    assert list(result["metrics"]) == ["acc1", "acc5", "mean_per_class_recall"]
    weights = str(tmp_path / "weights.pt")
    assert result | {"metrics": {}} == {
        "dataset": "pets", "model": "toy-vit", "pretrained": weights, "task": "zeroshot_classification",
        "metrics": {}, "language": "en",
    }  # fmt: skip
    table = (tmp_path / "results" / "weights.pt_toy-vit.md").read_text()
    assert f"| pets | {100 * result['metrics']['acc1']:.2f} |" in table


def test_names_are_put_into_the_root_as_clip_benchmark_does(tmp_path):
    labelled_set(tmp_path / "wds_vtab-pets")
    (tmp_path / "list.txt").write_text("# of VTAB\nwds/vtab/pets\n\n")
    words = command(tmp_path, tmp_path / "list.txt", dataset_root=f"{tmp_path}/wds_{{dataset_cleaned}}")
    assert main(words) == 0
    path = tmp_path / "results" / "wds_vtab_pets_zeroshot_classification.json"
    assert json.loads(path.read_text())["dataset"] == "wds/vtab/pets"


def test_a_finished_result_is_not_run_again(tmp_path, caplog):
    folder = labelled_set(tmp_path / "pets")
    words = command(tmp_path, folder)
    assert main(words) == 0
    path = tmp_path / "results" / "pets_zeroshot_classification.json"
    path.write_text(path.read_text().replace('"acc1": ', '"acc1": 7'))
    changed = path.read_text()
    assert main(words) == 0
    assert path.read_text() == changed
    assert "has a result" in caplog.text
    assert main([*words, "--overwrite"]) == 0
    assert path.read_text() != changed


def test_a_newer_checkpoint_is_evaluated_anew(tmp_path):
    words = command(tmp_path, labelled_set(tmp_path / "pets"))
    assert main(words) == 0
    path = tmp_path / "results" / "pets_zeroshot_classification.json"
    before = path.stat().st_mtime_ns
    os.utime(tmp_path / "weights.pt", ns=(before + 10**9, before + 10**9))
    assert main(words) == 0
    assert path.stat().st_mtime_ns > before


def test_the_result_of_another_checkpoint_is_not_taken_for_ones_own(tmp_path, caplog):
    words = command(tmp_path, labelled_set(tmp_path / "pets"))
    assert main(words) == 0
    (tmp_path / "other").mkdir()
    (tmp_path / "weights.pt").rename(tmp_path / "other" / "weights.pt")
    words[words.index("--pretrained") + 1] = str(tmp_path / "other" / "weights.pt")
    assert main(words) == EXIT_TRAINING
    assert f"has the result of pretrained {tmp_path}/weights.pt" in caplog.text
    assert "Failed" not in (tmp_path / "results" / "table.md").read_text(), "nor is its table replaced"


# ---- data sets that fail


def test_a_failing_data_set_does_not_lose_the_others(tmp_path, caplog, capsys):
    broken = labelled_set(tmp_path / "broken")
    (broken / "classnames.txt").unlink()
    strange = labelled_set(tmp_path / "strange")
    (strange / "dataset_type.txt").write_text("video")
    words = command(tmp_path, tmp_path / "nowhere", broken, strange, labelled_set(tmp_path / "pets"))
    assert main(words) == EXIT_TRAINING
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == [
        "pets_zeroshot_classification.json", "table.md",
    ]  # fmt: skip
    table = (tmp_path / "results" / "table.md").read_text()
    assert table.strip() == capsys.readouterr().out.strip()
    for reason in ("no test/nshards.txt", "classnames.txt is missing", "says 'video'"):
        assert reason in caplog.text
        assert reason in table


def test_a_failing_model_is_reported_for_each_data_set(tmp_path):
    """Features that are not finite are the model's fault, and yet no reason to leave a data set out."""
    words = command(tmp_path, labelled_set(tmp_path / "pets"), retrieval_set(tmp_path / "pairs"))
    weights = torch.load(tmp_path / "weights.pt", weights_only=True)
    weights["visual.proj"][0, 0] = torch.nan
    torch.save(weights, tmp_path / "weights.pt")
    assert main(words) == EXIT_TRAINING
    table = (tmp_path / "results" / "table.md").read_text()
    assert len(re.findall(r"^- (pets|pairs): .*NaN", table, re.MULTILINE)) == 2


def test_samples_that_cannot_be_read_are_no_silent_loss(tmp_path, caplog):
    chosen = [{"png": image(i), "cls": b"1"} for i in range(10)]
    chosen[3]["png"] = b"no"
    write_split(tmp_path / "pets", "test", chosen)
    write_classes(tmp_path / "pets")
    assert main(command(tmp_path, tmp_path / "pets")) == EXIT_TRAINING
    assert "1 of 10 samples cannot be used (1 bad_image)" in caplog.text
    assert main(command(tmp_path, tmp_path / "pets", max_skip_fraction="0.1")) == 0


@pytest.mark.parametrize(
    ("task", "make", "message"),
    [
        ("linear_probe", retrieval_set, "not possible on a retrieval set, only zeroshot_retrieval"),
        ("zeroshot_retrieval", labelled_set, "not possible on a classification set"),
        ("linear_probe", multilabel_set, "not possible on a multilabel set"),
    ],
)
def test_a_task_that_a_set_is_not_for_is_refused(tmp_path, caplog, task, make, message):
    assert main(command(tmp_path, make(tmp_path / "set"), task=task)) == EXIT_TRAINING
    assert message in caplog.text


# ---- flags


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give --dataset"),
        (["--dataset", "a", "--dataset-root", "/data"], "put {dataset} where it belongs"),
        (["--dataset", "a", "--val-split", "val"], "--val-split needs --task linear_probe"),
        (["--dataset", "a", "--val-proportion", "0.1"], "--val-proportion needs --task linear_probe"),
        (["--dataset", "a", "--val-proportion", "1"], "out of range"),
        (["--dataset", "a", "--image-mean", "0.5", "0.5"], "--image-mean takes 1 or 3 numbers: 2 given"),
        (["--dataset", "a", "--task", "captioning"], "invalid choice"),
        (["--dataset", "a", "--epochs", "3"], "unrecognized arguments: --epochs"),
    ],
)
def test_flags_that_mean_nothing_are_refused(capsys, words, message):
    with pytest.raises(SystemExit) as caught:
        main(["evaluate", *words])
    assert caught.value.code == EXIT_SETUP
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"output": "{nothing}.json"}, "is no template of a file"),
        ({"dataset_root": "/x/{dataset}/{y}"}, "known are {dataset} and {dataset_cleaned}"),
        ({"pretrained": "no_such_tag"}, "no_such_tag"),
    ],
)
def test_values_that_cannot_be_used_are_named(tmp_path, caplog, capfd, flags, message):
    random_weights(tmp_path)
    assert main(command(tmp_path, labelled_set(tmp_path / "pets"), **flags)) != 0
    assert message in caplog.text + capfd.readouterr().err


def test_two_data_sets_with_one_file_of_results_are_refused(tmp_path, caplog):
    words = command(tmp_path, labelled_set(tmp_path / "pets"), labelled_set(tmp_path / "cars"))
    assert main([*words, "--output", f"{tmp_path}/results/{{task}}.json"]) == EXIT_TRAINING
    assert "cars failed: its file of results would be" in caplog.text
    assert json.loads((tmp_path / "results" / "zeroshot_classification.json").read_text())["dataset"] == "pets"


def test_results_that_cannot_be_written_are_known_before_the_work(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    words = command(tmp_path, labelled_set(tmp_path / "pets"))
    assert main([*words, "--output", f"{tmp_path}/file/{{dataset}}.json"]) == EXIT_TRAINING
    assert "pets failed: cannot write" in caplog.text
    assert "pets: zeroshot_classification" not in caplog.text


def test_two_data_sets_of_one_name_are_refused(tmp_path, capfd):
    words = command(tmp_path, labelled_set(tmp_path / "a" / "pets"), labelled_set(tmp_path / "b" / "pets"))
    assert main(words) == EXIT_SETUP
    assert "several are called pets" in capfd.readouterr().err


def test_checkpoint_is_another_word_for_pretrained():
    assert parse_args(["--dataset", "a", "--checkpoint", "x.pt"])[1].model.pretrained == "x.pt"
    assert parse_args(["--dataset", "a"])[1].model.pretrained == ""


def test_help_of_training_names_the_commands(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    for name, entry in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(entry.summary)}$", said, re.MULTILINE)


# ---- where data and weights are


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path):
    """The address of an HTTP server of the test's folder."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path))) as found:
        thread = threading.Thread(target=found.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{found.server_port}"
        found.shutdown()
        thread.join()


def test_data_sets_behind_urls(tmp_path, server, caplog):
    labelled_set(tmp_path / "pets")
    retrieval_set(tmp_path / "pairs")
    local, remote = tmp_path / "local", tmp_path / "remote"
    local.mkdir()
    remote.mkdir()
    assert main(command(local, tmp_path / "pets", tmp_path / "pairs")) == 0
    assert main(command(remote, f"{server}/pets", f"{server}/pairs/", f"{server}/nowhere")) == EXIT_TRAINING
    for name, task in (("pets", "zeroshot_classification"), ("pairs", "zeroshot_retrieval")):
        assert metrics(remote, name, task) == metrics(local, name, task)
    assert f"{server}/nowhere: it has no test/nshards.txt" in caplog.text


def test_weights_behind_a_url(tmp_path):
    words = command(tmp_path, labelled_set(tmp_path / "pets"))
    assert main(words) == 0
    here = metrics(tmp_path, "pets", "zeroshot_classification")
    words[words.index("--pretrained") + 1] = f"file://{tmp_path}/weights.pt"
    assert main([*words, "--overwrite"]) == 0
    assert metrics(tmp_path, "pets", "zeroshot_classification") == here


def test_weights_that_are_not_behind_a_url_are_no_matter_of_resuming(tmp_path, capfd):
    random_weights(tmp_path)
    words = command(tmp_path, labelled_set(tmp_path / "pets"), pretrained=f"file://{tmp_path}/nowhere.pt")
    assert main(words) == EXIT_SETUP
    assert "nowhere.pt does not exist: give another checkpoint\n" in capfd.readouterr().err


# ---- processes


@pytest.mark.dist
def test_two_ranks_find_what_one_finds(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    sets = [retrieval_set(tmp_path / "pairs"), labelled_set(tmp_path / "pets"), multilabel_set(tmp_path / "voc")]
    (tmp_path / "broken").mkdir()
    assert main(command(one, *sets)) == 0
    with Ranks(tmp_path, 2, main, command(two, tmp_path / "broken", *sets)) as ranks:
        assert ranks.ends([0, 1], 60) == [EXIT_TRAINING, EXIT_TRAINING]
        assert "broken failed" in ranks.said(0)
    for path in (one / "results").glob("*.json"):
        name, _, task = path.stem.partition("_")
        assert metrics(two, name, task) == pytest.approx(metrics(one, name, task), abs=1e-6)


def test_the_launcher_knows_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["src/main.py", *command(tmp_path, labelled_set(tmp_path / "pets"))])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / "src" / "main.py"), run_name="__main__")
    assert caught.value.code == 0
    assert "| pets |" in capsys.readouterr().out


# ---- linear probe


def probe_set(folder: Path) -> Path:
    """Images whose brightness tells their class, in a training and a test split."""

    def files(count, seed):
        random = np.random.default_rng(seed)
        for number in range(count):
            level = 40 * (number % 6) + random.integers(0, 10)
            file = BytesIO()
            Image.new("RGB", (16, 16), (int(level), 255 - int(level), 40 * (number % 2))).save(file, "png")
            yield {"png": file.getvalue(), "cls": str(number % 6).encode()}

    write_split(folder, "train", list(files(60, 1)))
    write_split(folder, "test", list(files(18, 2)))
    write_split(folder, "val", list(files(12, 3)))
    write_classes(folder)
    return folder


@pytest.mark.parametrize("split", [{}, {"val_split": "val"}])
def test_a_probe_finds_classes_that_features_tell(tmp_path, split):
    assert main(command(tmp_path, probe_set(tmp_path / "set"), task="linear_probe", **split)) == 0
    found = metrics(tmp_path, "set", "linear_probe")
    assert {"lp_acc1", "lp_acc5", "lp_mean_per_class_recall", "C", "seed", "fewshot_k", "normalized"} == set(found)
    assert found["lp_acc1"] == found["lp_mean_per_class_recall"] == 1


@pytest.mark.dist
@pytest.mark.slow
def test_a_probe_on_two_ranks(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    words = [command(place, probe_set(tmp_path / "set"), task="linear_probe") for place in (one, two)]
    assert main(words[0]) == 0
    with Ranks(tmp_path, 2, main, words[1]) as ranks:
        assert ranks.ends([0, 1], 90) == [0, 0]
    assert metrics(two, "set", "linear_probe") == pytest.approx(metrics(one, "set", "linear_probe"))
