"""The one place where samples are chosen: scoring pass, ranking, top-k and store.

Shapes: N pairs of this rank, G pairs of all ranks, K kept, D features.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dissect_clip.batch import Batch
from dissect_clip.dist import World
from dissect_clip.scorer import Encoded
from dissect_clip.seeding import Stream, derive_seed
from dissect_clip.selection.base import Candidates, Needs, Selection, Strategy, required
from dissect_clip.selection.store import ScoreStore

Encode = Callable[[Batch], Encoded]
SampleLoss = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def kept(rate: float, size: int) -> int:
    """K, how many of ``size`` samples a rate in (0, 1] keeps: rounded, at least 1."""
    return max(1, round(rate * size))


def top_k(rank: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Places [K] of the k largest of ``rank`` [N], rising. Ties are broken at random, what is not finite comes last."""
    shuffled = torch.randperm(len(rank), generator=generator, device=rank.device)
    rank = torch.where(rank.isfinite(), rank.float(), -torch.inf)
    order = rank[shuffled].argsort(descending=True, stable=True)
    return shuffled[order[:k]].sort().values


def replace_unusable(index: Tensor, usable: Tensor) -> Tensor:
    """``index`` [K], rising, with the places that are not ``usable`` [N] bool replaced by others that are, in turn.

    K is the same on all ranks whatever their batches hold, so usable samples come twice where they do not suffice.
    Where none is usable, the choice stays as it is. No device sync.
    """
    usable_first = usable.float().argsort(descending=True, stable=True)
    turn = torch.arange(len(index), device=index.device) % usable.sum().clamp(min=1)
    replaced = torch.where(usable[index], index, usable_first[turn])
    return torch.where(usable.any(), replaced, index).sort().values


class Selector:
    """Chooses the part of each batch to train on, with one strategy, and keeps what the strategy remembers.

    A sample whose score is not finite is neither trained on nor remembered, and counted in ``not_finite``.

    Args:
        always_score: score in epochs that keep every sample, too, where the record wants the scores.
        keep_locked: hand the features of locked towers on to training.
    """

    def __init__(
        self,
        strategy: Strategy,
        store: ScoreStore,
        sample_loss: SampleLoss,
        world: World,
        seed: int,
        always_score: bool = False,
        keep_locked: bool = False,
    ) -> None:
        self.strategy = strategy
        self.store = store
        self.sample_loss = sample_loss
        self.world = world
        self.seed = seed
        self.always_score = always_score
        self.keep_locked = keep_locked
        self.not_finite = torch.zeros((), dtype=torch.int64, device=world.device)
        """Samples of this rank whose scores were not finite, on the device; the training loop sets it back."""

    @property
    def scoring(self) -> str:
        """What is scored, for the log."""
        return "nothing is scored" if self.strategy.needs is Needs.NOTHING else "every sample is scored in every step"

    def _scores(self, epoch: int) -> bool:
        """Whether this epoch needs a scoring pass: not when everything is kept and nothing will be read back."""
        if self.strategy.needs is Needs.NOTHING:
            return False
        if self.strategy.rate(epoch) < 1 or self.always_score:
            return True
        return bool(self.strategy.remembers) and self.strategy.config.select_rate < 1

    def _score(
        self, batch: Batch, encode: Encode, epoch: int, generator: torch.Generator
    ) -> tuple[Candidates, Encoded]:
        """The scoring pass, and what the strategy needs of it."""
        needs = self.strategy.needs
        with torch.no_grad():
            encoded = encode(batch)
            image, text = encoded.image_features, encoded.text_features
            similarity = (image * text).sum(dim=1)
            finite = similarity.isfinite()[:, None]
            image, text = image.where(finite, 0), text.where(finite, 0)  # they would spoil the losses of all others
            candidates = Candidates(
                epoch=epoch,
                generator=generator,
                memory=self.store.read(batch.sample_id),
                similarity=similarity,
                loss=self.sample_loss(image, text, encoded.logit_scale, encoded.logit_bias)
                if Needs.LOSS in needs
                else None,
                image_features=image if Needs.FEATURES in needs else None,
                text_features=text if Needs.FEATURES in needs else None,
            )
        return candidates, encoded

    def select(self, batch: Batch, encode: Encode, epoch: int, step: int) -> Selection:
        """The K pairs of this rank's batch to train on.

        No device sync. Collective where the strategy remembers (the store is written) or needs the loss (features
        are gathered). ``step`` counts the batches of the whole run; with seed and rank it decides every random choice.
        """
        device = batch.sample_id.device
        generator = torch.Generator(device)
        generator.manual_seed(derive_seed(self.seed, Stream.SELECT, step, self.world.rank))
        scored = self._scores(epoch)
        encoded = None
        if scored:
            candidates, encoded = self._score(batch, encode, epoch, generator)
        else:
            candidates = Candidates(epoch=epoch, generator=generator, memory=self.store.read(batch.sample_id))
        usable = _usable(candidates) if scored else None
        k = min(kept(self.strategy.rate(epoch), batch.drawn), len(batch))
        if k == len(batch):
            # Keeping all must keep the order, too: it is then bit for bit the batch that was loaded.
            index = torch.arange(k, device=device)
        else:
            rank = self.strategy.rank(candidates)
            index = top_k(rank if usable is None else rank.where(usable, torch.nan), k, generator)
        # Not asked where it would look at scores that were not taken.
        values = self.strategy.remember(candidates) if scored or self.strategy.needs is Needs.NOTHING else None
        if usable is not None:
            self.not_finite += (~usable).sum()
            index = replace_unusable(index, usable)
            values = None if values is None else values.where(usable[:, None], candidates.memory)
        if values is not None:
            self.store.write(batch.sample_id, values)
        if encoded is None:
            return Selection(index, None)
        features = encoded.known(index) if self.keep_locked else {}
        return Selection(index, candidates, scored=len(batch), features=features)

    def learn(self, batch: Batch, selection: Selection, image: Tensor, text: Tensor, step: int) -> None:
        """Take note of the features [K, D] that training computed for the chosen pairs; unused in exact scoring."""


def _usable(candidates: Candidates) -> Tensor:
    """[N] bool, whether the scores that were taken are finite."""
    usable = required(candidates.similarity).isfinite()
    return usable if candidates.loss is None else usable & candidates.loss.isfinite()
