"""The one place where samples are chosen: scoring pass, ranking, top-k and store.

Shapes: N pairs of this rank, G pairs of all ranks, K kept, D features.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dissect_clip.data.batch import Batch
from dissect_clip.distributed.world import World
from dissect_clip.seeding import Stream, derive_seed
from dissect_clip.selection.scoring import Encoded
from dissect_clip.selection.store import ScoreStore
from dissect_clip.selection.strategies.clean_posterior.decoys import Decoys
from dissect_clip.selection.strategy import Candidates, Needs, Selection, Strategy, kept, required

Encode = Callable[[Batch], Encoded]
SampleLoss = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]

log = logging.getLogger(__name__)


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
        keep_others: hand the features of the pairs that are not chosen on, too.
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
        keep_others: bool = False,
    ) -> None:
        self.strategy = strategy
        self.store = store
        self.sample_loss = sample_loss
        self.world = world
        self.seed = seed
        self.always_score = always_score
        self.keep_locked = keep_locked
        self.keep_others = keep_others
        self.not_finite = torch.zeros((), dtype=torch.int64, device=world.device)
        """Samples of this rank whose scores were not finite, on the device; the training loop sets it back."""
        self.reference: Encode | None = None
        """The scoring pass of the reference model; there is one where the strategy needs it."""
        self.decoys: Decoys | None = None
        """Samples with wrong captions; there are some where the strategy asks for them."""
        self.survey: tuple[float, ...] = ()
        """What the strategy knows of the whole store since the epoch began; the same on all ranks."""

    @property
    def scoring(self) -> str:
        """What is scored, for the log."""
        if Needs.REFERENCE in self.strategy.needs:
            return "every sample is scored by two models in every step after the warm-up, if there is one"
        return "nothing is scored" if self.strategy.needs is Needs.NOTHING else "every sample is scored in every step"

    def begin_epoch(self, epoch: int) -> None:
        """Let the strategy look at the whole store. Collective and a device sync, of strategies that ask for it.

        Rank 0 looks for all: K may depend on it, and ranks on other hardware may round otherwise.
        """
        if self.strategy.surveys:
            self.inform(self.world.on_main(lambda: self.strategy.survey(self.store.scores, epoch)))
        if self.strategy.finding:
            log.info("%s", self.strategy.finding)

    def decoys_in(self, epoch: int) -> Decoys | None:
        """The decoys, in an epoch in which they have their wrong captions."""
        return self.decoys if self.strategy.has_decoys(epoch) else None

    def inform(self, survey: Sequence[float]) -> None:
        """Go on with what the strategy knew of the store when the epoch began. Not collective."""
        self.survey = tuple(survey)
        self.strategy = self.strategy.informed(self.survey)

    def _matters_later(self, epoch: int) -> bool:
        """Whether what is remembered in this epoch may be read in a later one."""
        later = range(epoch + 1, self.strategy.config.training.epochs)
        return bool(self.strategy.remembers) and any(map(self.strategy.may_select, later))

    def _scores(self, epoch: int) -> bool:
        """Whether this epoch needs a scoring pass: not when everything is kept and nothing will be read back."""
        if self.strategy.needs is Needs.NOTHING:
            return False
        if self.always_score or self._matters_later(epoch):
            return True
        return self.strategy.rate(epoch) < 1 and self.strategy.looks_at(epoch) is not Needs.NOTHING

    def _score(
        self, batch: Batch, encode: Encode, epoch: int, generator: torch.Generator
    ) -> tuple[Candidates, Encoded]:
        """The scoring pass, and what the strategy needs of it."""
        needs = self.strategy.looks_at(epoch)
        with torch.no_grad():
            encoded = encode(batch)
            reference = required(self.reference)(batch) if Needs.REFERENCE in needs else None
            similarity = (encoded.image_features * encoded.text_features).sum(dim=1)
            if reference is not None:
                finite = (reference.image_features * reference.text_features).sum(dim=1).isfinite()
                similarity = similarity.where(finite, torch.nan)
            finite = similarity.isfinite()
            image, text, loss = self._parts(encoded, finite, needs)
            candidates = Candidates(
                epoch=epoch,
                generator=generator,
                memory=self.store.read(batch.sample_id),
                similarity=similarity,
                loss=loss,
                image_features=image,
                text_features=text,
                logit_scale=encoded.logit_scale,
                logit_bias=encoded.logit_bias,
            )
            if reference is not None:
                image, text, loss = self._parts(reference, finite, needs)
                candidates = dataclasses.replace(
                    candidates,
                    reference_loss=loss,
                    reference_image_features=image,
                    reference_text_features=text,
                    reference_logit_scale=reference.logit_scale,
                    reference_logit_bias=reference.logit_bias,
                )
        return candidates, encoded

    def _parts(
        self, encoded: Encoded, finite: Tensor, needs: Needs
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Features of images and texts, and losses, as far as they are needed; of pairs that are ``finite`` [N].

        The features of the others are 0: they would spoil the losses of all.
        """
        image, text = (part.where(finite[:, None], 0) for part in (encoded.image_features, encoded.text_features))
        loss = None
        if Needs.LOSS in needs:
            loss = self.sample_loss(image, text, encoded.logit_scale, encoded.logit_bias)
        return (image, text, loss) if Needs.FEATURES in needs else (None, None, loss)

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
        k = min(kept(self.strategy.rate(epoch), batch.num_candidates), len(batch))
        if k == len(batch):
            # Keeping all must keep the order, too: it is then bit for bit the batch that was loaded.
            index = torch.arange(k, device=device)
        else:
            rank = self.strategy.rank(candidates)
            index = top_k(rank if usable is None else rank.where(usable, torch.nan), k, generator)
        # Not asked where it would look at scores that were not taken.
        asked = scored or (self.strategy.needs is Needs.NOTHING and not self.strategy.learns)
        values = self.strategy.remember(candidates) if asked else None
        if usable is not None:
            self.not_finite += (~usable).sum()
            index = replace_unusable(index, usable)
            values = None if values is None else values.where(usable[:, None], candidates.memory)
        if values is not None:
            self.store.write(batch.sample_id, values)
        weight = self.strategy.weights(candidates, index) if k < len(batch) else None
        reported = self._report(candidates)
        if encoded is None:
            known = self.strategy.needs is Needs.NOTHING and self.strategy.remembers
            return Selection(index, candidates if known else None, weight=weight, reported=reported)
        features = encoded.known(index) if self.keep_locked else {}
        others = None
        if self.keep_others and k < len(batch):
            others = _others(encoded, index, required(usable))
        return Selection(
            index, candidates, scored=len(batch), features=features, others=others, weight=weight, reported=reported
        )

    def _report(self, candidates: Candidates) -> Tensor | None:
        """What the strategy has to say of each sample, where the run keeps a record."""
        wanted = self.strategy.config.selection.record and self.strategy.reports
        return self.strategy.report(candidates) if wanted else None

    def learn(self, batch: Batch, selection: Selection, image: Tensor, text: Tensor, step: int) -> None:
        """Take note of the features [K, D] that training computed for the chosen pairs; unused in exact scoring."""

    def count_on(self, then: int, now: int) -> None:
        """A resumed run has done ``now`` batches where the one before counted ``then``; unused in exact scoring."""

    def learns(self, epoch: int) -> bool:
        """Whether the strategy wants to know the losses of this epoch's training pass."""
        strategy = self.strategy
        return strategy.learns and strategy.learns_in(epoch) and self._matters_later(epoch)

    def training_loss(
        self, image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor | None = None
    ) -> Tensor:
        """The contrastive loss [K] of pairs by the features [K, D] that training computed for them, against those of
        all ranks; NaN where they are not finite. Collective: features are gathered. No device sync.
        """
        with torch.no_grad():
            image, text = image.detach().float(), text.detach().float()
            finite = (image * text).sum(dim=1, keepdim=True).isfinite()
            image, text = image.where(finite, 0), text.where(finite, 0)  # they would spoil the losses of all others
            bias = None if logit_bias is None else logit_bias.detach().float()
            return self.sample_loss(image, text, logit_scale.detach().float(), bias).where(finite[:, 0], torch.nan)

    def learn_losses(self, batch: Batch, selection: Selection, loss: Tensor) -> None:
        """Let the strategy remember the losses [K] of the chosen pairs. Collective where it does: one all_gather."""
        candidates, index = required(selection.candidates), selection.index
        taken = dataclasses.replace(candidates, memory=candidates.memory[index], loss=loss)
        values = self.strategy.remember(taken)
        if values is not None:
            self.store.write(batch.sample_id[index], values.where(loss.isfinite()[:, None], taken.memory))


def _others(encoded: Encoded, index: Tensor, usable: Tensor) -> Tensor:
    """Features [N - K, 2 D] of the pairs that are not at ``index`` [K]; 0 where they are not ``usable`` [N] bool."""
    chosen = torch.zeros_like(usable, dtype=torch.uint8).index_fill_(0, index, 1)
    places = chosen.argsort(stable=True)[: len(usable) - len(index)]
    features = torch.cat([encoded.image_features, encoded.text_features], dim=1)
    return features.where(usable[:, None], 0)[places]


def _usable(candidates: Candidates) -> Tensor:
    """[N] bool, whether the scores that were taken are finite."""
    usable = required(candidates.similarity).isfinite()
    for loss in (candidates.loss, candidates.reference_loss):
        usable = usable if loss is None else usable & loss.isfinite()
    return usable
