"""Scores that are used again: what is known of a sample from earlier steps, in a form that does not grow old.

Shapes: N pairs of this rank, F of them scored anew, K kept, C columns of the strategy, R columns for the scores.

All scores drift while the model learns, so those taken at different times say little beside each other. Here each is
kept as a z-score: how many standard deviations the pair lies above the mismatched pairs of the same batch under the
same weights. The training pass gives it for the kept samples at no cost; only ``--score-refresh`` of the others, the
ones whose scores are the oldest, get a forward pass of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dissect_clip.data.batch import Batch
from dissect_clip.distributed.world import World
from dissect_clip.errors import SetupError
from dissect_clip.seeding import Stream, derive_seed
from dissect_clip.selection.selector import Encode, SampleLoss, Selector, replace_unusable, top_k
from dissect_clip.selection.store import ScoreStore
from dissect_clip.selection.strategy import REUSABLE, Candidates, Needs, Selection, Strategy, clip_score, kept, required

_WHEN = "last_batch"
_MEASURED = {"last_score": Needs.SCORE, "last_loss": Needs.LOSS, "last_clip_score": Needs.CLIPSCORE}
"""Columns for what is measured of a pair, in this order, and who needs them."""


def _standardise(own: Tensor, others: Tensor, weight: Tensor, dim: tuple[int, ...]) -> Tensor:
    """``own`` in standard deviations above the mean of ``others``, both weighted over ``dim``."""
    count = weight.sum(dim, keepdim=True)
    mean = (others * weight).sum(dim, keepdim=True) / count
    deviation = ((others - mean).square() * weight).sum(dim, keepdim=True).div(count).sqrt()
    return (own - mean.flatten()) / deviation.flatten()


def pair_z(image: Tensor, text: Tensor, needs: Needs) -> Tensor:
    """Scores [N, R] of the pairs of ``image`` and ``text`` [N, D], unit norm: z-scores against the mismatched pairs.

    For ``SCORE`` the cosine is held against that of all mismatched pairs. For ``LOSS`` against those with the same
    image and those with the same text, and the mean of both is taken. In the InfoNCE of its row a mismatched pair in
    the place of the true one would change the cosine alone, so this is minus the z-score of the pair's loss. For
    ``CLIPSCORE`` it is CLIPScore itself, which drifts.

    NaN for a pair whose features are not finite, which counts for no other; not finite for fewer than two pairs.
    """
    finite = (image.isfinite().all(dim=1) & text.isfinite().all(dim=1))[:, None]
    image, text = image.float().where(finite, 0), text.float().where(finite, 0)
    cosine = image @ text.T
    own = cosine.diagonal()
    weight = (finite & finite.T).float().fill_diagonal_(0)
    columns = []
    if Needs.SCORE in needs:
        columns.append(_standardise(own, cosine, weight, (0, 1)))
    if Needs.LOSS in needs:
        columns.append((_standardise(own, cosine, weight, (0,)) + _standardise(own, cosine, weight, (1,))) / 2)
    if Needs.CLIPSCORE in needs:
        columns.append(clip_score(own))
    return torch.stack(columns, dim=1).where(finite, torch.nan)


@dataclass(frozen=True)
class Known:
    """What is known of samples before they are scored, as rows of the store. Picklable; a pure function of numbers.

    A row holds the strategy's own columns, then the last z-scores, then the batch of the run they were taken in.

    Raises:
        SetupError: if the strategy looks at more than scores.
    """

    strategy: Strategy
    refresh: float  # share of a batch that is scored anew, below 1

    def __post_init__(self) -> None:
        if self.strategy.needs & ~REUSABLE:
            config = self.strategy.config
            raise SetupError(
                f"--score-refresh {config.selection.score_refresh:g} ranks by scores of earlier steps, but "
                "--select-strategy "
                f"{config.selection.select_strategy} looks at more than scores, at features or at a reference model: "
                "leave "
                "--score-refresh and --select-preset out"
            )

    def informed(self, survey: Sequence[float]) -> Known:
        """The same with what the strategy knows of the whole store."""
        return replace(self, strategy=self.strategy.informed(survey)) if survey else self

    @property
    def measured(self) -> tuple[str, ...]:
        """Names of the R columns with scores."""
        return tuple(name for name, part in _MEASURED.items() if part in self.strategy.needs)

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of all columns; without scores the strategy's own."""
        return (*self.strategy.remembers, *self.measured, *((_WHEN,) if self.measured else ()))

    def kept(self, epoch: int, size: int) -> int:
        """K, how many of ``size`` samples are trained on."""
        return kept(self.strategy.rate(epoch), size)

    def fresh(self, epoch: int, size: int) -> int:
        """F, how many of ``size`` samples get a forward pass: none where all are kept, all in the first epoch.

        But for strategies that can do without scores at first.
        """
        if not self.measured or self.kept(epoch, size) == size:
            return 0
        if epoch == 0 and not self.strategy.reuses:
            return size
        # A z-score needs another pair beside it, and that of a loss two: all are of one image, or of one caption.
        fewest = 3 if Needs.LOSS in self.strategy.needs else 2
        return min(size, max(fewest, round(self.refresh * size))) if self.refresh > 0 else 0

    def candidates(self, rows: Tensor, epoch: int, generator: torch.Generator) -> Candidates:
        """Samples by what their rows [N, C + R + 1] tell."""
        own = len(self.strategy.remembers)
        known = dict(zip(self.measured, rows[:, own:].unbind(dim=1), strict=False))
        loss = known.get("last_loss")
        return Candidates(
            epoch=epoch,
            generator=generator,
            memory=rows[:, :own],
            reused=known.get("last_score"),
            loss=None if loss is None else -loss,
            last_clip_score=known.get("last_clip_score"),
        )

    def stalest(self, rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """Places [count] of the samples whose scores are the oldest, rising; those never scored come first."""
        return top_k(-rows[:, -1].nan_to_num(-1), count, generator)

    def rank(self, candidates: Candidates) -> Tensor:
        """The strategy's rank [N]; samples that it cannot tell anything about are at the mean of the others."""
        rank = self.strategy.rank(candidates).float()
        known = rank.isfinite()
        mean = rank.where(known, 0).sum() / known.sum().clamp(min=1)
        return rank.where(known, mean)


class ReusingSelector(Selector):
    """Chooses by scores of earlier steps, with as many new ones as ``--score-refresh`` says, and learns from training.

    A sample whose features in the scoring pass are not finite is not trained on, and counted in ``not_finite``.
    """

    def __init__(self, known: Known, store: ScoreStore, sample_loss: SampleLoss, world: World, seed: int) -> None:
        super().__init__(known.strategy, store, sample_loss, world, seed)
        self.known = known

    def inform(self, survey: Sequence[float]) -> None:
        """See :meth:`Selector.inform`."""
        super().inform(survey)
        self.known = replace(self.known, strategy=self.strategy)

    @property
    def scoring(self) -> str:
        """See :attr:`Selector.scoring`."""
        refresh = self.known.refresh
        when = "" if self.strategy.reuses else " after the first epoch"
        return f"{f'{refresh:g} of it is' if refresh > 0 else 'nothing is'} scored{when}"

    def select(self, batch: Batch, encode: Encode, epoch: int, step: int) -> Selection:
        """The K pairs of this rank's batch to train on; see :meth:`Selector.select`. Not collective, no device sync.

        Of a batch that was chosen from before it was loaded, the first F are scored.
        """
        device = batch.sample_id.device
        generator = torch.Generator(device)
        generator.manual_seed(derive_seed(self.seed, Stream.SELECT, step, self.world.rank))
        rows = self.store.read(batch.sample_id)
        k, count = (
            self.known.kept(epoch, batch.num_candidates),
            min(self.known.fresh(epoch, batch.num_candidates), len(batch)),
        )
        usable = torch.ones(len(batch), dtype=torch.bool, device=device)
        if count == len(batch) or count == 0 or batch.num_candidates > len(batch):
            fresh = torch.arange(count, device=device)
        else:
            fresh = self.known.stalest(rows, count, generator)
        if count > 0:
            part = batch if count == len(batch) else batch.take(fresh)
            with torch.no_grad():
                encoded = encode(part)
                z = pair_z(encoded.image_features, encoded.text_features, self.strategy.needs)
            finite = (encoded.image_features * encoded.text_features).sum(dim=1).isfinite()
            usable = usable.index_copy(0, fresh, finite)
            self.not_finite += (~usable).sum()
            rows = rows.index_copy(0, fresh, self._updated(rows[fresh], z, step))
        candidates = self.known.candidates(rows, epoch, generator)
        if k >= len(batch):
            index = torch.arange(len(batch), device=device)
        else:
            index = top_k(self.known.rank(candidates).where(usable, torch.nan), k, generator)
        if count > 0:
            index = replace_unusable(index, usable)
        weight = self.strategy.weights(candidates, index) if k < len(batch) else None
        return Selection(index, candidates, fresh, rows, count, weight, reported=self._report(candidates))

    def learn(self, batch: Batch, selection: Selection, image: Tensor, text: Tensor, step: int) -> None:
        """Store the new scores, of the scoring pass and of the training pass. Collective: one all_gather.

        ``image``, ``text`` [K, D] are the features that training computed for ``selection.index``.
        """
        rows, fresh = required(selection.rows), required(selection.fresh)
        z = pair_z(image.detach(), text.detach(), self.strategy.needs)
        rows = rows.index_copy(0, selection.index, self._updated(rows[selection.index], z, step))
        places = torch.cat([fresh, selection.index])
        new = rows[places]
        candidates = required(selection.candidates)
        candidates = self.known.candidates(new, candidates.epoch, candidates.generator)
        decoys = self.decoys_in(candidates.epoch)
        if decoys is not None:
            candidates = replace(candidates, decoy=decoys.among(batch.sample_id[places]))
        remembered = self.strategy.remember(candidates)
        if remembered is not None:
            new = torch.cat([remembered, new[:, remembered.shape[1] :]], dim=1)
        scored = (new[:, -1] == step)[:, None]  # not so where neither pass gave a finite score
        ids = batch.sample_id[places]
        self.store.write(ids, new.where(scored, self.store.read(ids)))

    def count_on(self, then: int, now: int) -> None:
        """See :meth:`Selector.count_on`: the batches that scores were taken in stay in order, and before now."""
        self.store.scores[:, -1] *= now / then

    def _updated(self, rows: Tensor, z: Tensor, step: int) -> Tensor:
        """Rows [N, C + R + 1] with new z-scores [N, R], where these are finite."""
        own = rows.shape[1] - z.shape[1] - 1
        new = torch.cat([rows[:, :own], z, torch.full_like(rows[:, -1:], step)], dim=1)
        return new.where(z.isfinite().all(dim=1, keepdim=True), rows)
