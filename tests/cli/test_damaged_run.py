"""A whole run on real pairs of which 3 % are damaged, in every way that docs/reference/data.md lists for a sample."""

import io
import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from damage import WAYS, Content, Way, damaged, write_members
from PIL import Image
from runs import losses, results, train
from shards_util import read_shard

EVERY = 33
"""One sample in so many is damaged: 3 %."""

Files = Mapping[str, bytes]


def read_pairs(path: Path) -> list[tuple[str, dict[str, bytes]]]:
    """Keys with their files by suffix, and a json that has the caption, too."""
    return [
        (key, files | {"json": json.dumps({"text": files["txt"].decode()}).encode()}) for key, files in read_shard(path)
    ]


Treatment = Callable[[Way, str, Files], dict[str, Content]]
"""What becomes of a sample that is to be damaged: its members by name."""


def damage(way: Way, key: str, files: Files) -> dict[str, Content]:
    """Do it."""
    with Image.open(io.BytesIO(files["jpg"])) as picture:
        return damaged(way, key, picture.convert("RGB"), files["txt"].decode())


def leave_a_gap(way: Way, key: str, files: Files) -> dict[str, Content]:
    """Neither image nor caption where they cannot be used anyhow; the others keep their ids."""
    return damage(way, key, files) if way.kind is None else {f"{key}.gone": b""}


TREATMENTS: dict[str, Treatment] = {"bad": damage, "gap": leave_a_gap}


def write_set(folder: Path, shards: list[Path], ways: list[Way], treat: Treatment) -> str:
    """The shards anew; returns their pattern."""
    number = 0
    for shard in shards:
        members: dict[str, Content] = {}
        for key, files in read_pairs(shard):
            place, rest = divmod(number, EVERY)
            number += 1
            if rest == EVERY // 2:
                members |= treat(ways[place % len(ways)], key, files)
            else:
                members |= {f"{key}.{suffix}": content for suffix, content in files.items()}
        write_members(folder / shard.name, members.items())
    return str(folder / "*.tar")


def counted(run: Path, epoch: int) -> Counter[str]:
    """What was left out in an epoch, by kind."""
    counts: Counter[str] = Counter()
    for row in pq.read_table(run / "skipped.parquet" / f"epoch_{epoch:05d}.parquet").to_pylist():
        counts[row["kind"]] += row["samples"]
    return counts


@pytest.mark.slow
@pytest.mark.parametrize(("in_json", "num_shards"), [(False, 7), (True, 2)], ids=["txt", "json"])
def test_damaged_samples_change_nothing_for_the_others(tmp_path: Path, emoji: Path, in_json: bool, num_shards: int):
    shards = sorted(emoji.glob("train-*.tar"))[:num_shards]
    ways = [way for way in WAYS.values() if way.in_json == in_json]
    flags: dict[str, Any] = {
        "epochs": 2, "batch_size": 50, "lr": 0.01, "wd": 0.1, "warmup": 20, "val_data": emoji / "val-00000{0,1}.tar",
    }  # fmt: skip
    if in_json:
        flags |= {"json_caption_key": "text", "val_data": tmp_path / "gap" / shards[-1].name}
    patterns = [write_set(tmp_path / name, shards, ways, treat) for name, treat in TREATMENTS.items()]
    bad, gap = (train(tmp_path, data, name, **flags) for name, data in zip(TREATMENTS, patterns, strict=True))
    num_damaged = (sum(len(read_pairs(shard)) for shard in shards) + EVERY // 2) // EVERY
    expected = Counter(way.kind for way in (ways[place % len(ways)] for place in range(num_damaged)) if way.kind)
    for epoch in range(2):
        assert counted(bad, epoch) == expected
        assert counted(gap, epoch) == {"no_caption": expected.total()}
    assert losses(bad) == losses(gap)
    assert results(bad) == results(gap)
    assert results(bad)[-1]["rsum"] > 0


def test_what_an_evaluation_leaves_out_is_told(tmp_path: Path, pairs: Path, caplog: pytest.LogCaptureFixture):
    samples = read_pairs(pairs / "val.tar")[:40]
    for place, broken in ((3, {"jpg": b"no image"}), (5, {"jpg": b""}), (7, {"txt": b" "})):
        samples[place][1].update(broken)
    members = {f"{key}.{suffix}": files[suffix] for key, files in samples for suffix in ("jpg", "txt")}
    val = write_members(tmp_path / "val.tar", members.items())
    run = train(tmp_path, str(pairs / "train-0.tar"), epochs=2, val_data=val)
    assert [line["num_samples"] for line in results(run)] == [37, 37]
    told = [record.message for record in caplog.records if "evaluation on val" in record.message]
    assert told == 2 * ["evaluation on val left samples out: 2 bad_image, 1 empty_caption"]
