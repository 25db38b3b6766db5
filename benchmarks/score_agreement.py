#!/usr/bin/env python3
"""How often a cheaper scoring pass chooses what the exact one chooses, and what it costs.

    python benchmarks/score_agreement.py --checkpoint epoch_3.pt epoch_4.pt --train-data 'shards/*.tar' \\
        --model ViT-tiny [--batch-size 256] [--image-sizes 32 48] [--patch-dropouts 0.25 0.5 0.75] \\
        [--context-lengths 16] [--micro-batches 64]

Whatever else is given are flags of a run: the model, the data, --device and so on.

`choices` is the share of the exact pass's choices that a cheaper one makes, too: the `--rate` of each batch with the
highest CLIPScore, under the last checkpoint. `differential` is the same for the largest fall of CLIPScore from one
checkpoint to the next, where both are scored in the same way. Choosing at random gives the rate itself. `time` is over
the exact pass's, which takes `exact_ms`; the passes take turns, and median and quartiles are reported.

Exact is fp32. Besides the flags, bf16 autocast is compared, with features normalised in float32, as the scoring pass
does, and inside autocast, as open_clip does.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import open_clip
import torch
from common import in_turns, quartiles, ratios, report
from torch import Tensor, nn

from dissect_clip.config.parser import parse_args
from dissect_clip.data import build_train
from dissect_clip.data.batch import Batch
from dissect_clip.distributed.world import World
from dissect_clip.errors import SetupError
from dissect_clip.models.build import Model, build_model
from dissect_clip.models.precision import autocast_for
from dissect_clip.selection import STRATEGIES
from dissect_clip.selection.strategy import clip_score, kept
from dissect_clip.training.scoring import Scorer, Shortcuts

Pass = Callable[[Batch], Tensor]
"""Batch -> [N] cosines."""


def scoring_pass(module: nn.Module, precision: str, device: torch.device, shortcuts: Shortcuts) -> Pass:
    """The package's own."""
    scorer = Scorer(module, autocast_for(precision, device), "eval", False, shortcuts)

    def score(batch: Batch) -> Tensor:
        encoded = scorer(batch)
        return (encoded.image_features * encoded.text_features).sum(dim=1)

    return score


def normalised_in_autocast(module: nn.Module, device: torch.device) -> Pass:
    """As open_clip computes features."""

    @torch.no_grad()
    def score(batch: Batch) -> Tensor:
        module.eval()
        with autocast_for("amp_bf16", device)():
            image = module.encode_image(batch.image, normalize=True)
            text = module.encode_text(batch.text, normalize=True)
        return (image.float() * text.float()).sum(dim=1)

    return score


def asked_for(options: argparse.Namespace) -> Iterator[Shortcuts]:
    yield from (Shortcuts(batch_size=size) for size in options.micro_batches)
    yield from (Shortcuts(image_size=size) for size in options.image_sizes)
    yield from (Shortcuts(patch_dropout=share) for share in options.patch_dropouts)
    yield from (Shortcuts(context_length=length) for length in options.context_lengths)


def passes(model: Model, options: argparse.Namespace, device: torch.device) -> tuple[dict[str, Pass], dict[str, str]]:
    """All ways to score, by name, and the reasons why some do not go with the model."""
    found = {
        "exact": scoring_pass(model.module, "fp32", device, Shortcuts()),
        "bf16": scoring_pass(model.module, "amp_bf16", device, Shortcuts()),
        "bf16, normalised in it": normalised_in_autocast(model.module, device),
    }
    refused = {}
    for shortcuts in asked_for(options):
        try:
            scorer = Scorer(model.module, autocast_for("fp32", device), "eval", False, shortcuts)
            scorer.try_out(model.tokenizer(["one", "another"]), None)
        except SetupError as error:
            refused[str(shortcuts)] = str(error)
        else:
            found[str(shortcuts)] = scoring_pass(model.module, "fp32", device, shortcuts)
    return found, refused


def timed(score: Pass, batch: Batch) -> Callable[[], float]:
    def seconds() -> float:
        start = time.perf_counter()
        score(batch).sum().item()  # waits for the device
        return time.perf_counter() - start

    return seconds


def agreement(exact: Sequence[Tensor], cheap: Sequence[Tensor], rate: float) -> float:
    """Share of the same choices, over all batches."""
    shares = []
    for wanted, found in zip(exact, cheap, strict=True):
        k = kept(rate, len(wanted))
        both = set(wanted.topk(k).indices.tolist()) & set(found.topk(k).indices.tolist())
        shares.append(len(both) / k)
    return round(statistics.mean(shares), 4)


def falls(before: Sequence[Tensor], after: Sequence[Tensor]) -> list[Tensor]:
    return [clip_score(old) - clip_score(new) for old, new in zip(before, after, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, nargs="+", help="of one run, the last trained furthest")
    parser.add_argument("--rate", type=float, default=0.3)
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--micro-batches", type=int, nargs="*", default=[64])
    parser.add_argument("--image-sizes", type=int, nargs="*", default=[])
    parser.add_argument("--patch-dropouts", type=float, nargs="*", default=[0.25, 0.5, 0.75])
    parser.add_argument("--context-lengths", type=int, nargs="*", default=[16])
    options, words = parser.parse_known_args()
    config = parse_args([*words, "--workers", "0", "--logs", "none", "--precision", "fp32"], STRATEGIES)
    world = World(device=torch.device(config.distributed.device))
    model = build_model(config, world)
    data = build_train(config, world, model.preprocess_train, model.tokenizer, None)
    batches = [batch.to(world.device) for batch in itertools.islice(data.loader, options.batches)]
    ways, refused = passes(model, options, world.device)
    scores: list[dict[str, list[Tensor]]] = []
    for checkpoint in options.checkpoint:
        open_clip.load_checkpoint(model.module, checkpoint)
        scores.append({name: [score(batch) for batch in batches] for name, score in ways.items()})
    seconds = in_turns({name: timed(score, batches[0]) for name, score in ways.items()}, options.turns)
    figures: dict[str, dict[str, object]] = {}
    for name in ways:
        if name == "exact":
            continue
        choices = agreement(scores[-1]["exact"], scores[-1][name], options.rate)
        figures[name] = {"choices": choices, "time": quartiles(ratios(seconds[name], seconds["exact"]))}
        pairs = list(itertools.pairwise(scores))
        if pairs:
            fallen = [agreement(falls(a["exact"], b["exact"]), falls(a[name], b[name]), options.rate) for a, b in pairs]
            figures[name]["differential"] = round(statistics.mean(fallen), 4)
    report(
        "score_agreement",
        model=config.model.model,
        image_size=list(batches[0].image.shape[-2:]),
        batch_size=config.training.batch_size,
        checkpoints=[checkpoint.split("/")[-1] for checkpoint in options.checkpoint],
        rate=options.rate,
        exact_ms=quartiles(1000 * value for value in seconds["exact"]),
        passes=figures,
        refused=refused,
    )


if __name__ == "__main__":
    main()
