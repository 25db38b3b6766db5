"""Training on shards: ids, epochs, skipped samples. Ranks are simulated in this process, but for collectives."""

import gc
import logging
import pickle
import weakref
from collections import Counter
from itertools import chain

import numpy as np
import pytest
import torch
from open_clip import SimpleTokenizer
from open_clip.transform import image_transform
from processes import run_on_ranks
from shards_util import (
    caption_of,
    data_config,
    image_bytes,
    jittered,
    make_shard,
    make_shards,
    sample,
    to_tensor,
    tokenize,
    write_json,
    write_tar,
)

from dissect_clip.data import build_train
from dissect_clip.data import train_stream as stream
from dissect_clip.data.formats.urls import expand
from dissect_clip.data.sampling.shard_ids import ShardIndex
from dissect_clip.data.train_shards import parse_factors, train_data
from dissect_clip.distributed.world import World
from dissect_clip.errors import SetupError, TrainingError


def load(config, world=None, sizes=None, transform=to_tensor):
    """The loader of one simulated rank; with ``sizes`` as if they were recorded."""
    if sizes is None:
        return build_train(config, world or World(), transform, tokenize, None)
    sources = expand(config.data.train_data)
    urls = tuple(chain(*sources))
    index = ShardIndex(urls, np.array(sizes), "test")
    return train_data(config, world or World(), transform, tokenize, sources, index)


def epoch_of(data, epoch=0):
    data.set_epoch(epoch)
    batches = []
    for batch in data.loader:
        data.consume(batch)
        batches.append(batch)
    return batches


def ids_of(batches):
    return [sample_id for batch in batches for sample_id in batch.sample_id.tolist()]


def nonzero(skipped):
    return {kind: count for kind, count in skipped.items() if count}


def check_pairs(batches):
    """The caption and the image's color are made from the expected id."""
    for batch in batches:
        assert batch.text[:, 0].tolist() == batch.sample_id.tolist()
        assert (batch.image[:, 0, 0, 0] * 255).round().int().tolist() == [i % 256 for i in batch.sample_id.tolist()]


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (1, 2), (2, 1), (3, 2)])
@pytest.mark.parametrize("sizes", [[17], [3, 11, 1, 8], [4] * 9], ids=str)
def test_every_sample_is_seen_once_an_epoch(tmp_path, world_size, workers, sizes):
    config = data_config(train_data=make_shards(tmp_path, sizes), workers=workers, batch_size=3)
    ranks = [load(config, World(rank=r, size=world_size), sizes) for r in range(world_size)]
    epochs = [epoch_of(rank) for rank in ranks]
    assert {len(batches) for batches in epochs} == {ranks[0].num_batches}
    assert {len(batch) for batches in epochs for batch in batches} == {3}
    counts = Counter(chain(*map(ids_of, epochs)))
    assert set(counts) == set(range(sum(sizes)))
    assert sum(counts.values()) - sum(sizes) < 3 * world_size
    assert max(counts.values()) <= 2
    for batches in epochs:
        check_pairs(batches)


def test_ids_belong_to_keys_and_shards(tmp_path):
    config = data_config(train_data=make_shards(tmp_path, [3, 5, 2]), select=True, record=True)
    data = load(config)
    assert data.shard_sizes.tolist() == [3, 5, 2]
    for batch in epoch_of(data):
        keys = [bytes(key.tolist()).rstrip(b"\0").decode() for key in batch.key]
        assert [int(key) for key in keys] == batch.sample_id.tolist()
        shards = [data.shard_names[place] for place in data.locate(batch.sample_id.numpy())]
        assert shards == [
            "train-000.tar" if i < 3 else "train-001.tar" if i < 8 else "train-002.tar" for i in map(int, keys)
        ]


def test_keys_are_left_out_where_nobody_reads_them(tmp_path):
    assert epoch_of(load(data_config(train_data=make_shards(tmp_path, [4]))))[0].key is None


@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_seed_and_epoch_give_the_same_batches(tmp_path, workers):
    config = data_config(train_data=make_shards(tmp_path, [9, 6]), workers=workers)
    first, second = load(config, transform=jittered), load(config, transform=jittered)
    ahead = epoch_of(first, 3)
    epoch_of(second, 2)
    for left, right in zip(ahead, epoch_of(second, 3), strict=True):
        assert left.sample_id.tolist() == right.sample_id.tolist()
        assert torch.equal(left.image, right.image)
        assert torch.equal(left.text, right.text)


def test_one_worker_reads_as_the_training_process_does(tmp_path):
    config = data_config(train_data=make_shards(tmp_path, [9, 6]))
    own = epoch_of(load(config, transform=jittered))
    worker = epoch_of(load(config.replace(workers=1), transform=jittered))
    assert ids_of(own) == ids_of(worker)
    assert all(torch.equal(a.image, b.image) for a, b in zip(own, worker, strict=True))


def test_epochs_and_seeds_differ(tmp_path):
    config = data_config(train_data=make_shards(tmp_path, [20, 20]))
    data, other = load(config), load(config.replace(seed=1))
    orders = [ids_of(epoch_of(data, 0)), ids_of(epoch_of(data, 1)), ids_of(epoch_of(other, 0))]
    assert len({tuple(order) for order in orders}) == 3


def test_loading_leaves_the_training_process_s_random_numbers_alone(tmp_path):
    data = load(data_config(train_data=make_shards(tmp_path, [9])), transform=jittered)
    state = torch.get_rng_state()
    epoch_of(data)
    assert torch.equal(state, torch.get_rng_state())


def test_what_is_loaded_can_be_sent_to_spawned_workers(tmp_path):
    config = data_config(train_data=make_shards(tmp_path, [5]))
    index = ShardIndex(tuple(expand(config.data.train_data)[0]), np.array([5]), "test")
    transform = image_transform(8, is_train=True)
    data = train_data(config, World(), transform, SimpleTokenizer(), expand(config.data.train_data), index)
    copy = pickle.loads(pickle.dumps(data.stream))
    assert [b.sample_id.tolist() for b in copy] == [b.sample_id.tolist() for b in data.loader]


@pytest.mark.parametrize(
    ("suffix", "mode"),
    [("jpg", "RGB"), ("JPEG", "L"), ("png", "RGB"), ("png", "RGBA"), ("PNG", "P"), ("webp", "RGB"), ("webp", "RGBA")],
)
def test_image_formats_become_rgb(tmp_path, suffix, mode):
    kind = {"jpg": "jpeg"}.get(suffix, suffix.lower())
    files = {suffix: image_bytes(200, kind, mode=mode), "txt": caption_of(0).encode()}
    make_shard(tmp_path / "0.tar", {"a": files})
    (batch,) = epoch_of(load(data_config(train_data=f"{tmp_path}/0.tar", batch_size=1)))
    assert batch.image.shape == (1, 3, 8, 8)
    assert batch.image[0, 0, 0, 0] > 0.1


def test_captions_in_json(tmp_path):
    records = ['{"text": "sample 0"}', '{"text": ["sample 1", "other"]}', '{"text": "sample 2"}']
    shard = {f"{i}": sample(i, txt=b"wrong", json=record.encode()) for i, record in enumerate(records)}
    make_shard(tmp_path / "0.tar", shard)
    batches = epoch_of(load(data_config(train_data=f"{tmp_path}/0.tar", json_caption_key="text")))
    check_pairs(batches)


BAD = {
    1: ({"png": None}, "no_image"),
    4: ({"txt": None}, "no_caption"),
    5: ({"png": b"not an image"}, "bad_image"),
    9: ({"png": image_bytes(9)[:40]}, "bad_image"),
    12: ({"txt": b"\xff\xfe"}, "bad_caption"),
}
KINDS = {"no_image": 1, "no_caption": 1, "bad_image": 2, "bad_caption": 1}


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_are_counted_and_made_up_for(tmp_path, workers, caplog):
    bad = {number: files for number, (files, _) in BAD.items()}
    config = data_config(train_data=make_shards(tmp_path, [9, 6], bad), workers=workers, batch_size=5)
    data = load(config)
    for epoch in (0, 1):
        batches = epoch_of(data, epoch)
        assert [len(batch) for batch in batches] == [5, 5, 5]
        assert set(ids_of(batches)) == set(range(15)) - set(BAD)
        check_pairs(batches)
        assert nonzero(data.skip_counts()) == KINDS
    if workers == 0:
        warned = [record.message for record in caplog.records if record.message.startswith("skipping")]
        assert len(warned) == len(KINDS)
        assert any("sample 000001 of train-000.tar: it has no image" in message for message in warned)


def test_every_kind_is_there_so_that_ranks_can_add_up(tmp_path):
    data = load(data_config(train_data=make_shards(tmp_path, [4])))
    assert len(data.skip_counts()) > 5
    assert set(data.skip_counts().values()) == {0}


@pytest.mark.parametrize(
    ("record", "kind"),
    [(b"{", "bad_caption"), (b'{"text": 3}', "bad_caption"), (b"{}", "no_caption"), (b"[]", "no_caption"),
     (b'{"text": null}', "no_caption"), (b'{"text": []}', "no_caption"), (None, "no_caption")],
)  # fmt: skip
def test_bad_json_is_counted(tmp_path, record, kind):
    good = [sample(i, json=f'{{"text": "{caption_of(i)}"}}'.encode()) for i in range(3)]
    make_shard(tmp_path / "0.tar", {f"{i}": files for i, files in enumerate([*good, sample(3, json=record)])})
    data = load(data_config(train_data=f"{tmp_path}/0.tar", json_caption_key="text"))
    assert set(ids_of(epoch_of(data))) == {0, 1, 2}
    assert nonzero(data.skip_counts()) == {kind: 1}


def test_more_samples_than_recorded_never_take_the_next_shard_s_ids(tmp_path):
    make_shards(tmp_path, [6, 4])
    data = load(data_config(train_data=f"{tmp_path}/train-{{000..001}}.tar"), sizes=[4, 4])
    batches = epoch_of(data)
    assert sorted(ids_of(batches)) == list(range(8))
    captions = {
        i: c for batch in batches for i, c in zip(batch.sample_id.tolist(), batch.text[:, 0].tolist(), strict=True)
    }
    assert captions == {0: 0, 1: 1, 2: 2, 3: 3, 4: 6, 5: 7, 6: 8, 7: 9}
    assert nonzero(data.skip_counts()) == {"beyond_recorded_size": 2}


def test_fewer_samples_than_recorded_are_counted(tmp_path):
    data = load(data_config(train_data=make_shards(tmp_path, [3, 4])), sizes=[8, 4])
    batches = epoch_of(data)
    assert len(batches) == 3
    assert set(ids_of(batches)) == {0, 1, 2, 8, 9, 10, 11}
    assert nonzero(data.skip_counts()) == {"below_recorded_size": 5}


def test_a_shard_cut_off_after_it_was_counted(tmp_path):
    data = load(data_config(train_data=make_shards(tmp_path, [4, 4])))
    path = tmp_path / "train-000.tar"
    path.write_bytes(path.read_bytes()[: 2048 * 2 + 1024 + 100])  # two samples and an image
    batches = epoch_of(data)
    assert set(ids_of(batches)) == {0, 1, 4, 5, 6, 7}
    assert nonzero(data.skip_counts()) == {"no_caption": 1, "damaged_shard": 1}


def test_a_shard_that_went_away(tmp_path):
    data = load(data_config(train_data=make_shards(tmp_path, [4, 4])))
    (tmp_path / "train-000.tar").unlink()
    assert set(ids_of(epoch_of(data))) == {4, 5, 6, 7}
    assert nonzero(data.skip_counts()) == {"unreadable_shard": 4}


@pytest.mark.parametrize(
    ("workers", "extra"),
    [(0, {}), (1, {}), (0, {"dataset_resampled": True}), (0, {"train_num_samples": 6})],
)
def test_data_without_any_usable_sample_stops_the_run(tmp_path, workers, extra):
    bad = {i: {"png": b"no"} for i in range(6)}
    pattern = make_shards(tmp_path, [3, 3], bad)
    data = load(data_config(train_data=pattern, workers=workers, **extra))
    with pytest.raises(TrainingError, match=r"no usable image-caption pair(.|\n)*train-00.\.tar(.|\n)*bad_image"):
        epoch_of(data)


# ---- sizes not known


def test_openclip_command_lines_for_remote_shards_need_no_count(tmp_path):
    make_shards(tmp_path, [4, 4, 4])
    pattern = f"pipe:cat {tmp_path}/train-{{000..002}}.tar"
    config = data_config(train_data=pattern, train_num_samples=16, workers=2)
    data = load(config)
    batches = epoch_of(data)
    assert [len(batch) for batch in batches] == [4] * 4
    assert set(ids_of(batches)) == {-1}
    assert {n for batch in batches for n in batch.text[:, 0].tolist()} == set(range(12))
    assert data.num_samples == 16
    assert not (tmp_path / "sizes.json").exists()
    assert data.shard_sizes is None
    with pytest.raises(ValueError, match="not numbered"):
        data.locate(np.array([-1]))


def test_shards_of_unknown_size_are_split_over_ranks(tmp_path):
    make_shards(tmp_path, [4] * 5)
    config = data_config(train_data=f"{tmp_path}/train-{{000..004}}.tar", train_num_samples=20, batch_size=2)
    sources = expand(config.data.train_data)
    ranks = [train_data(config, World(rank=r, size=2), to_tensor, tokenize, sources, None) for r in (0, 1)]
    seen = [{n for batch in epoch_of(rank) for n in batch.text[:, 0].tolist()} for rank in ranks]
    assert seen[0] & seen[1] == set()
    assert [rank.num_batches for rank in ranks] == [5, 5]


def test_remote_shards_that_are_too_few_stop_with_the_command(tmp_path):
    make_shards(tmp_path, [4])
    config = data_config(train_data=f"pipe:cat {tmp_path}/train-000.tar", train_num_samples=4, workers=2)
    with pytest.raises(SetupError, match=r"1 shards, fewer than the 2 loader workers(.|\n)*clip index 'pipe:cat"):
        load(config)


def test_sizes_beside_remote_shards_are_used(tmp_path):
    make_shards(tmp_path, [5])
    write_json(tmp_path / "sizes.json", {"train-000.tar": 5})
    config = data_config(train_data=f"pipe:cat {tmp_path}/train-000.tar", select=True, workers=2)
    batches = epoch_of(load(config))
    assert set(ids_of(batches)) == set(range(5))
    check_pairs(batches)


def test_few_local_shards_are_counted_and_shared_with_a_warning(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    data = load(data_config(train_data=make_shards(tmp_path, [8]), train_num_samples=8, workers=2))
    assert sorted(ids_of(epoch_of(data))) == list(range(8))
    assert "1 shards for 2 loader workers" in caplog.text


# ---- number of samples


def test_a_wrong_number_of_samples_is_reported_with_both(tmp_path):
    pattern = make_shards(tmp_path, [3, 4])
    write_json(tmp_path / "sizes.json", {"train-000.tar": 3, "train-001.tar": 4})
    with pytest.raises(SetupError, match=r"--train-num-samples 9 .* 7 samples .*Remove .*--dataset-resampled"):
        load(data_config(train_data=pattern, train_num_samples=9))
    assert load(data_config(train_data=pattern, train_num_samples=7)).num_samples == 7


def test_resampled_epochs_have_the_asked_length_and_the_ids_of_the_whole_set(tmp_path):
    pattern = make_shards(tmp_path, [3, 4, 5])
    config = data_config(train_data=pattern, train_num_samples=40, dataset_resampled=True, select=True, workers=2)
    data = load(config)
    batches = epoch_of(data)
    assert (data.num_batches, len(batches), data.num_samples) == (10, 10, 12)
    check_pairs(batches)
    assert ids_of(batches) == ids_of(epoch_of(load(config)))
    assert ids_of(batches) != ids_of(epoch_of(data, 1))


def test_resampling_follows_the_factors(tmp_path):
    first, second = make_shards(tmp_path / "a", [10] * 4), make_shards(tmp_path / "b", [10] * 4)
    config = data_config(
        train_data=f"{first}::{second}", dataset_resampled=True, train_num_samples=4000, batch_size=100, select=True,
        train_data_upsampling_factors="1::4",
    )  # fmt: skip
    ids = np.array(ids_of(epoch_of(load(config))))
    assert 0.75 < (ids >= 40).mean() < 0.85


@pytest.mark.parametrize(
    ("text", "message"), [("1", "1 factors, but .* 2 sources"), ("1::0", "above 0"), ("1::x", "numbers joined by ::")]
)
def test_bad_factors_are_reported(text, message):
    with pytest.raises(SetupError, match=message):
        parse_factors(text, 2)


# ---- bad input


def test_missing_and_empty_shards_stop_before_training(tmp_path):
    make_shards(tmp_path, [3])
    with pytest.raises(SetupError, match="2 of 3 shards are missing"):
        load(data_config(train_data=f"{tmp_path}/train-{{000..002}}.tar"))
    write_tar(tmp_path / "train-001.tar", [])
    for given in (None, 6):
        with pytest.raises(SetupError, match=r"1 of 2 shards are empty: .*train-001\.tar"):
            load(data_config(train_data=f"{tmp_path}/train-{{000..001}}.tar", train_num_samples=given))


def test_an_unknown_type_is_reported(tmp_path):
    data = tmp_path / "data.zip"
    with pytest.raises(SetupError, match=r"data\.zip: there is no such file or folder"):
        load(data_config(train_data=str(data)))
    data.touch()
    with pytest.raises(SetupError, match=r"known type.*--dataset-type webdataset, csv or synthetic"):
        load(data_config(train_data=str(data)))


# ---- real processes and real data


def _on_rank(world, pattern, broken, run_folder):
    config = data_config(train_data=pattern, select=True, workers=1, batch_size=2)
    data = build_train(config, world, to_tensor, tokenize, run_folder)
    with pytest.raises(SetupError) as error:
        build_train(data_config(train_data=broken), world, to_tensor, tokenize, None)
    return ids_of(epoch_of(data)), (data.num_samples, data.fingerprint), str(error.value)


@pytest.mark.dist
def test_two_ranks_share_the_samples_and_the_errors(tmp_path):
    broken = tmp_path / "0.tar"
    broken.write_text("no tar" * 200)
    results = run_on_ranks(2, _on_rank, make_shards(tmp_path, [5, 3]), str(broken), tmp_path)
    ids, facts, errors = zip(*results, strict=True)
    assert sorted(chain(*ids)) == list(range(8))
    assert facts[0] == facts[1]
    assert all("cannot read the shard" in error for error in errors)


def test_the_emoji_set(emoji, tmp_path):
    pattern = f"{emoji}/train-{{000000..000012}}.tar"
    config = data_config(train_data=pattern, select=True, record=True, batch_size=500, workers=2)
    data = build_train(config, World(), to_tensor, tokenize, tmp_path)
    batches = epoch_of(data)
    keys = {
        sample_id: bytes(key.tolist()).rstrip(b"\0").decode()
        for batch in batches
        for sample_id, key in zip(batch.sample_id.tolist(), batch.key, strict=True)
    }
    assert data.num_samples == 6324
    assert [keys[i] for i in range(6324)] == (emoji / "train_keys.txt").read_text().split()
    assert nonzero(data.skip_counts()) == {}


def test_a_finished_epoch_leaves_nothing_behind(tmp_path, monkeypatch):
    config = data_config(train_data=make_shards(tmp_path, [8, 8]), batch_size=4, workers=0)
    data = load(config)
    readers = []
    real = stream._PairReader
    monkeypatch.setattr(
        stream, "_PairReader", lambda *args: (made := real(*args), readers.append(weakref.ref(made)))[0]
    )
    gc.collect()
    gc.disable()
    try:
        assert len(list(data.stream)) == 4
        assert [reader() for reader in readers] == [None]
    finally:
        gc.enable()
