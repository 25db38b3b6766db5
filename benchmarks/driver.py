"""Runs a trainer's own main with its own flags, and prints when each of its steps began: `python driver.py NAME FLAGS`.

NAME is `ours` or `openclip`. Both ask their schedule for the learning rate at the beginning of every step, once the
batch is there; that is where the clock is read. On a GPU the queue of kernels runs ahead by a step or so, which many
steps even out. The last line of the output is JSON: the seconds between one step's beginning and the next one's.

It needs no package but the trainer's, so that OpenCLIP can run in an environment of its own.
"""

import json
import sys
import time
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def watched(schedule, begun):
    """The schedule, noting the time of every call."""

    def wrapped(step):
        begun.append(time.perf_counter())
        return schedule(step)

    return wrapped


def run_openclip(words, begun):
    """open_clip_train.main on our small models as well as its own."""
    import open_clip
    import open_clip_train.main as trainer

    open_clip.add_model_config(ROOT / "src" / "dissect_clip" / "models" / "configs")
    train_one_epoch = trainer.train_one_epoch

    def train_watched(model, data, loss, epoch, optimizer, scaler, scheduler, *others, **more):
        return train_one_epoch(model, data, loss, epoch, optimizer, scaler, watched(scheduler, begun), *others, **more)

    trainer.train_one_epoch = train_watched
    trainer.main(words)


def run_ours(words, begun):
    """The command line of this project."""
    sys.path.insert(0, str(ROOT / "src"))
    from dissect_clip.cli import main, training_run

    learning_rate = training_run.learning_rate
    training_run.learning_rate = lambda *arguments: watched(learning_rate(*arguments), begun)
    if status := main(words):
        sys.exit(status)


if __name__ == "__main__":
    begun = []
    {"ours": run_ours, "openclip": run_openclip}[sys.argv[1]](sys.argv[2:], begun)
    print("\n" + json.dumps([round(after - before, 6) for before, after in pairwise(begun)]))
