"""Golden values: what every strategy computed when its values were last meant to change, bit for bit on a CPU.

``python tests/test_golden.py --write`` makes ``assets/golden/values.json`` anew. That is for a change that is meant to
change values, which CHANGELOG.md has to say, or, on a commit that is known to be good, for another machine or torch;
never to let a change of structure pass. The checkpoints of format 2 stand for files that users have, and stay as they
are; ``--write checkpoint_v2`` made them.

Only the command line and the files of a run are used: src/main.py, train.jsonl, record/ and checkpoints/.
"""

from __future__ import annotations

import json
import lzma
import runpy
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from golden_driver import BATCHES, EPOCHS, MAIN, Case, captions, jobs_of, machine, make_data, run_jobs, values_of

ASSETS = Path(__file__).parent / "assets"
VALUES = ASSETS / "golden" / "values.json"
OLD = ASSETS / "checkpoint_v2"

SAME = "as the run that was not interrupted"
TOLERANCE = 1e-3
COMPARED = 2
"""Losses of a run that are compared where they cannot be the same bit for bit: later ones hang on what was selected."""

DECIDES = ("torch", "arch", "capability")
"""What has to be the same for equal bits."""

# ---- cases


def selecting(strategy: str, **flags: Any) -> dict[str, Any]:
    """Flags that select half of every batch, with settings that do so within three epochs."""
    own: dict[str, dict[str, Any]] = {
        "warmup_base_sampling": {"warmup_point": 1},
        "learnability": {"warmup_point": 1},
        "jest": {"warmup_point": 1, "jest_chunks": 4},
        "historical_base_sampling": {"select_momentum": 0.3},
        "scan": {"scan_warmup": 0, "scan_period": 2},
        "clean_posterior": {"warmup_point": 1, "clean_decoys": 0.3},
    }
    return {"select": True, "select_strategy": strategy, "select_rate": 0.5} | own.get(strategy, {}) | flags


STRATEGIES = (
    "small_loss", "big_loss", "clipscore", "random", "historical_base_sampling", "warmup_base_sampling", "divbs",
    "learnability", "jest", "negcliploss", "infobatch", "scan", "clean_posterior",
)  # fmt: skip


def grid(ranks: int, accum_freq: int) -> list[Case]:
    """Every strategy, and none; patches are dropped in training, so that random numbers are drawn in it."""
    flags = {"accum_freq": accum_freq, "force_patch_dropout": 0.3}
    every: dict[str, dict[str, Any]] = {"none": {}} | {strategy: selecting(strategy) for strategy in STRATEGIES}
    return [Case(f"{name}, ranks {ranks}, accum-freq {accum_freq}", own | flags, ranks) for name, own in every.items()]


FLAGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rate 1": selecting("small_loss", select_rate=1.0),
    "combination": selecting("small_loss:0.7+clipscore:0.3"),
    "another combination": selecting("big_loss:0.4+clipscore:0.6"),
    "warmup, fast": selecting("warmup_base_sampling", select_preset="fast"),
    "warmup, refresh": selecting("warmup_base_sampling", score_refresh=0.25),
    "warmup, refresh, before load": selecting("warmup_base_sampling", score_refresh=0.25, select_before_load=True),
    "warmup rate 1": selecting("warmup_base_sampling", warmup_select_rate=1.0),
    "clipscore, fast": selecting("clipscore", select_preset="fast"),
    "clipscore, refresh": selecting("clipscore", score_refresh=0.25),
    "random, before load": selecting("random", select_before_load=True),
    "all negatives": selecting("small_loss", select_negatives="all"),
    "siglip": {"siglip": True},
    "siglip, small_loss": selecting("small_loss", siglip=True),
    "siglip, jest": selecting("jest", siglip=True),
    "siglip, divbs": selecting("divbs", siglip=True),
    "linear rate": selecting("small_loss", select_rate_schedule="linear"),
    "last epoch on all": selecting("small_loss", select_full_last=0.3),
    "momentum 0.9": selecting("historical_base_sampling", select_momentum=0.9),
    "negcliploss, parts": selecting("negcliploss", negcliploss_batches=3, negcliploss_batch_size=4),
    "infobatch, not rescaled": selecting("infobatch", select_rescale="off"),
    "clean, long warm-up": selecting("clean_posterior", warmup_point=2),
    "clean, exact": selecting("clean_posterior", select_preset="exact"),
    "scored smaller": selecting("small_loss", score_image_size=8),
    "scored with fewer patches": selecting("small_loss", score_patch_dropout=0.5),
    "scored with fewer tokens": selecting("small_loss", score_context_length=4),
    "scored in parts": selecting("small_loss", score_batch_size=5),
    "scored in training mode": selecting("small_loss", select_score_mode="train", model="golden-rn"),
    "worker": selecting("warmup_base_sampling", workers=1),
    "resampled": selecting("warmup_base_sampling", dataset_resampled=True, train_num_samples=96),
    "locked tower": selecting("clipscore", model="golden-rn", lock_image=True, lock_image_freeze_bn_stats=True,
                              score_keep_locked=True),
    "RN-tiny": selecting("jest", model="RN-tiny"),
    "ViT-tiny": selecting("small_loss", model="ViT-tiny"),
}  # fmt: skip
TWO_RANKS: dict[str, dict[str, Any]] = {
    "siglip": selecting("small_loss", siglip=True),
    "all negatives": selecting("divbs", select_negatives="all"),
    "local loss": selecting("small_loss", local_loss=True, gather_with_grad=True),
    "warmup, fast": selecting("warmup_base_sampling", select_preset="fast"),
    "RN": selecting("clipscore", model="golden-rn"),
}
WHOLE_ONLY = {
    "rate 1", "another combination", "siglip", "last epoch on all", "momentum 0.9", "negcliploss, parts",
    "infobatch, not rescaled", "scored smaller",
    "scored with fewer patches", "scored with fewer tokens", "scored in parts", "ViT-tiny",
}  # fmt: skip
"""Not resumed, which takes half the time again."""

REMOVED = {
    "jest, deterministic", "divbs, features, exact", "clean, no decoys", "clean, loss, gaussian, mean",
    "clean, clipscore, quantile, last", "clean, beta, forgetting",
}  # fmt: skip
"""Golden values of flags that were removed since, see ``dissect_clip.config.flags``; e2bc6e6 is the last with them."""

PARTS: dict[str, list[Case]] = {
    "1 rank": grid(1, 1) + grid(1, 2),
    "2 ranks, accum-freq 1": grid(2, 1),
    "2 ranks, accum-freq 2": grid(2, 2) + [Case(f"{name}, ranks 2", flags, 2) for name, flags in TWO_RANKS.items()],
    "flags": [Case(name, flags, resumes=name not in WHOLE_ONLY) for name, flags in FLAGS.items()],
}
OLD_CASES = {
    "clean_posterior": Case("clean_posterior, format 2", selecting("clean_posterior", warmup_point=2)),
    "jest": Case("jest, format 2", selecting("jest")),
}

# ---- running and comparing


def begun(case: Case) -> dict[str, Any]:
    """From where on the run counts that goes on from the case's step checkpoint."""
    accum = case.flags.get("accum_freq", 1)
    step = int(case.kept.rpartition("_")[2])
    return {"since": (1, step * accum - BATCHES), "first_step": step}


def measure(part: list[Case], data: Path, folder: Path) -> dict[str, Any]:
    """Run all cases of a part; their values by name."""
    logs = folder / "logs"
    run_jobs(folder, [job for case in part for job in jobs_of(case, data, logs)], part[0].ranks)
    found = {}
    for case in part:
        found[case.name] = values_of(logs / case.name)
        if not case.resumes:
            continue
        rest = values_of(logs / case.name, **begun(case))
        resumed = values_of(logs / f"{case.name}-resumed", **begun(case))
        found[case.name]["resumed"] = SAME if resumed == rest else resumed
    return found


def flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The quantities of a case, each with a name for messages, in the order of their computation."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from flat(item, f"{name}, {key}" if name else key)
    elif isinstance(value, list):
        for place, item in enumerate(value):
            yield from flat(item, f"{name}[{place}]")
    else:
        yield name, value


def readable(value: Any) -> str:
    """A number in decimals besides, where it is one."""
    return f"{value} = {float.fromhex(value)!r}" if isinstance(value, str) and value.startswith("0x") else str(value)


def differences(found: dict[str, Any], golden: dict[str, Any]) -> list[str]:
    """The first quantity of every case that differs."""
    lines = []
    for case, values in golden.items():
        now, then = dict(flat(found[case])), dict(flat(values))
        for name in [*then, *(name for name in now if name not in then)]:
            if now.get(name) != then.get(name):
                lines.append(f"{case}: {name} is {readable(now.get(name))}, was {readable(then.get(name))}")
                break
    return lines


def near(found: dict[str, Any], golden: dict[str, Any]) -> None:
    """The first losses agree but for rounding."""
    for case, values in golden.items():
        now, then = ([float.fromhex(word) for word in each["losses"][:COMPARED]] for each in (found[case], values))
        assert now == pytest.approx(then, rel=TOLERANCE), f"the first losses of {case}"


def check(found: dict[str, Any], golden: dict[str, Any], here: dict[str, str], there: dict[str, str]) -> None:
    """Compare exactly where that is possible; otherwise a little, and skip."""
    assert found.keys() == golden.keys(), "cases without golden values, or values without a case: --write"
    other = [f"{name} is {here[name]}, was {there[name]}" for name in there if here.get(name) != there[name]]
    if any(here[name] != there[name] for name in DECIDES):
        near(found, golden)
        pytest.skip(
            f"only the first {COMPARED} losses were compared, to {TOLERANCE:g}: the golden values are of another "
            f"machine or torch ({'; '.join(other)}). For values of this one run `python tests/test_golden.py "
            "--write` on a commit that is known to be good"
        )
    lines = differences(found, golden)
    assert not lines, "\n".join(
        ["the first quantity that differs, of each case:", *lines, f"other libraries: {'; '.join(other) or 'none'}"]
    )


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(VALUES.read_text())
    return content


# ---- tests


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("part", PARTS)
def test_every_number_is_what_it_was(tmp_path: Path, golden: dict[str, Any], part: str) -> None:
    found = measure(PARTS[part], make_data(tmp_path / "data"), tmp_path)
    assert [name for name, values in found.items() if values.get("resumed", SAME) != SAME] == []
    if "rate 1" in found:
        assert found["rate 1"]["losses"] == found["plain"]["losses"]
        assert found["rate 1"]["weights"] == found["plain"]["weights"]
    expected = {name: values for name, values in golden["cases"][part].items() if name not in REMOVED}
    check(found, expected, machine(tmp_path), golden["machine"])


@pytest.mark.slow
def test_checkpoints_of_format_2_inside_an_epoch_are_resumed(tmp_path: Path, golden: dict[str, Any]) -> None:
    found = resume_old(make_data(tmp_path / "data"), tmp_path)
    check(found, golden["format 2"], machine(tmp_path), golden["machine"])


def test_every_strategy_has_golden_values(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [MAIN, "--help-all"])
    with pytest.raises(SystemExit):
        runpy.run_path(MAIN, run_name="__main__")
    lines = capsys.readouterr().out.partition("\nstrategies:\n")[2].partition("\n\n")[0].splitlines()
    assert [line.split()[0] for line in lines] == list(STRATEGIES)


def resume_old(data: Path, folder: Path) -> dict[str, Any]:
    """Go on from the checkpoints of format 2."""
    jobs = []
    for name, case in OLD_CASES.items():
        for packed in (OLD / name).glob("*.xz"):
            path = folder / "old" / name / packed.stem
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(lzma.decompress(packed.read_bytes()))
        resume = folder / "old" / name / f"{case.kept}.pt"
        assert torch.load(resume, weights_only=True)["dissect"]["format_version"] == 2
        jobs.append({"name": case.name, "argv": case.words(data, folder / "logs", name, resume=resume)})
    run_jobs(folder, jobs, 1)
    return {name: values_of(folder / "logs" / name, **begun(case)) for name, case in OLD_CASES.items()}


# ---- writing


def write_old(data: Path, folder: Path) -> None:
    """Make the checkpoints of format 2 from weights whose rows of tokens that no caption has are 0, to be packed."""
    logs = folder / "logs"
    first = Case("first", {})
    run_jobs(folder, [{"name": "first", "argv": first.words(data, logs, "first", epochs=EPOCHS)}], 1)
    weights = torch.load(logs / "first" / "checkpoints" / f"epoch_{EPOCHS}.pt", weights_only=True)["state_dict"]
    used = open_clip.get_tokenizer("RN50")(captions()).unique()
    rows = torch.zeros_like(weights["token_embedding.weight"])
    weights["token_embedding.weight"] = rows.index_copy_(0, used, weights["token_embedding.weight"][used])
    torch.save(weights, folder / "start.pt")
    for name, case in OLD_CASES.items():
        job = jobs_of(case, data, logs)[0]
        job["argv"] += ["--pretrained", str(folder / "start.pt")]
        run_jobs(folder, [job], 1)
        (OLD / name).mkdir(parents=True, exist_ok=True)
        for path in Path(job["keep_in"]).iterdir():
            (OLD / name / f"{path.name}.xz").write_bytes(lzma.compress(path.read_bytes(), preset=9))


def write(folder: Path) -> None:
    """Make the values anew."""
    data = make_data(folder / "data")
    content = {
        "cases": {name: measure(part, data, folder / name) for name, part in PARTS.items()},
        "format 2": resume_old(data, folder / "format 2"),
        "machine": machine(folder / "format 2"),
    }
    VALUES.parent.mkdir(parents=True, exist_ok=True)
    VALUES.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        if sys.argv[1:] == ["--write"]:
            write(Path(scratch))
        elif sys.argv[1:] == ["--write", "checkpoint_v2"]:
            write_old(make_data(Path(scratch, "data")), Path(scratch))
        else:
            sys.exit("usage: python tests/test_golden.py --write [checkpoint_v2]")
