#!/usr/bin/env python3
"""What a choice costs once the features are there, by strategy and number of candidates.

    python benchmarks/choice_cost.py [--sizes 256 1280] [--features 512] [--rate 0.3] [--device cpu] [--turns 10]

A line for each size with milliseconds of `rank` by strategy, median and quartiles; the scoring passes are left out. A
reference model has features of the same width.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence

import torch
from common import in_turns, quartiles, report
from torch.nn.functional import normalize

from dissect_clip.config.settings import Config
from dissect_clip.selection import Candidates, build_strategy

MODES = {
    "small_loss": {},
    "divbs": {},
    "learnability": {},
    "jest": {},
    "jest siglip": {"siglip": True},
    "negcliploss": {},
}
"""Settings by name, which begins with the strategy's."""


def make_candidates(size: int, features: int, device: torch.device) -> Candidates:
    """Random pairs whose cosines are like those of a trained model."""
    random = torch.Generator(device)
    random.manual_seed(0)

    def pairs() -> tuple[torch.Tensor, torch.Tensor]:
        image, noise = torch.randn(2, size, features, device=device, generator=random)
        return normalize(image, dim=1), normalize(image + 2 * noise, dim=1)

    (image, text), (reference_image, reference_text) = pairs(), pairs()
    scale = torch.tensor(50.0, device=device)
    loss, reference_loss = torch.rand(2, size, device=device, generator=random)
    return Candidates(
        epoch=0,
        generator=random,
        memory=torch.zeros(size, 0, device=device),
        similarity=(image * text).sum(dim=1),
        loss=loss,
        image_features=image,
        text_features=text,
        logit_scale=scale,
        reference_loss=reference_loss,
        reference_image_features=reference_image,
        reference_text_features=reference_text,
        reference_logit_scale=scale,
    )


def milliseconds(name: str, candidates: Candidates, rate: float) -> Callable[[], float]:
    """How long a choice takes; waits for the device."""
    config = Config.of(select=True, select_rate=rate, select_reference="given", select_strategy=name.split()[0],
                       **MODES[name])  # type: ignore[arg-type]  # fmt: skip
    strategy = build_strategy(config)

    def choose() -> float:
        if candidates.memory.is_cuda:
            torch.cuda.synchronize()
        began = time.perf_counter()
        with torch.no_grad():
            rank = strategy.rank(candidates)
        assert len(rank.cpu()) == len(candidates.memory)
        return 1000 * (time.perf_counter() - began)

    return choose


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 1280])
    parser.add_argument("--features", type=int, default=512)
    parser.add_argument("--rate", type=float, default=0.3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--turns", type=int, default=10)
    options = parser.parse_args(argv)
    for size in options.sizes:
        candidates = make_candidates(size, options.features, torch.device(options.device))
        works = {name: milliseconds(name, candidates, options.rate) for name in MODES}
        found = in_turns(works, options.turns)
        shape = {"candidates": size, "features": options.features, "rate": options.rate}
        report("choice_cost", **shape, milliseconds={name: quartiles(values) for name, values in found.items()})


if __name__ == "__main__":
    main()
