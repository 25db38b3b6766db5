#!/usr/bin/env python3
"""OpenCLIP's own training loader, for loader.py: runs an epoch for each empty line on stdin, and says how long it took.

Imports nothing of this project: it runs in a Python that has open_clip and the webdataset that OpenCLIP needs.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
import time
from types import SimpleNamespace

import open_clip
from open_clip_train.data import get_wds_dataset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", required=True)
    parser.add_argument("--samples", type=int, required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--pixels", type=int, required=True)
    options = parser.parse_args()
    answers = sys.stdout
    sys.stdout = sys.stderr  # whatever else is printed must not come between the answers
    args = SimpleNamespace(
        train_data=options.shards,
        train_num_samples=options.samples,
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        batch_size=options.batch_size,
        workers=options.workers,
        world_size=1,
        seed=0,
    )
    transform = open_clip.transform.image_transform(options.pixels, is_train=True)
    data = get_wds_dataset(args, transform, is_train=True, tokenizer=open_clip.get_tokenizer("ViT-B-32"))
    versions = {name: importlib.metadata.version(name) for name in ("open_clip_torch", "webdataset", "torch", "pillow")}
    print(json.dumps(versions), file=answers, flush=True)
    for epoch, line in enumerate(sys.stdin):
        if line == "end\n":
            break
        data.set_epoch(epoch)
        began, samples = time.perf_counter(), 0
        for images, _ in data.dataloader:
            samples += len(images)
        print(json.dumps({"samples": samples, "seconds": time.perf_counter() - began}), file=answers, flush=True)


if __name__ == "__main__":
    main()
