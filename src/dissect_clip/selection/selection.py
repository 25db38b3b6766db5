"""Online sample selection as an object: the rows of each batch to train on, and what is remembered of every sample.

Shapes: N pairs of this rank, G pairs of all ranks, M samples of the dataset, K kept, F scored, D features, C columns.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dissect_clip.config.settings import Config
from dissect_clip.distributed.world import World
from dissect_clip.errors import SetupError
from dissect_clip.models.loss import SampleLoss
from dissect_clip.seeding import Stream, derive_seed
from dissect_clip.selection.current_scores import PairScores, current_candidates
from dissect_clip.selection.earlier_scores import EarlierScores, pair_z
from dissect_clip.selection.mixins import (
    LearnsFromTraining,
    ReportsSamples,
    ReusesScores,
    SurveysAll,
    UsesDecoys,
    learns_in,
    may_select,
    memory_settings,
    needs_in,
    survey_format,
    survey_names,
    survey_summary,
    with_survey,
)
from dissect_clip.selection.options import library_settings
from dissect_clip.selection.store import ScoreStore, check_ids
from dissect_clip.selection.strategies.build import build_strategy
from dissect_clip.selection.strategies.clean_posterior.decoys import Decoys, decoy_ids
from dissect_clip.selection.strategy import Candidates, Needs, Strategy, kept
from dissect_clip.selection.top_k import replace_unusable, top_k

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """The rows of a batch to train on."""

    index: Tensor
    """[K] int64, rising. K is the same on all ranks. Rows repeat only if fewer than K have finite scores."""
    weight: Tensor | None = None
    """[K] float32, the factor of each row's loss; None if all are 1."""
    scored: int = 0
    """Rows whose scores were computed in this step."""
    usable: Tensor | None = None
    """[N] bool, rows whose scores are finite; None if nothing was scored."""
    candidates: Candidates | None = None
    """What the strategy ranked by; None if it knows nothing of this batch."""
    reported: Tensor | None = None
    """[N, P] float32, what the strategy reports of each row for the record; None without a record."""


@dataclass(frozen=True, slots=True, eq=False)
class _Plan:
    """How a batch is chosen from, before anything of it is scored."""

    sample_id: Tensor  # [N]
    step: int
    k: int
    generator: torch.Generator  # seeded from (seed, step, rank), and drawn from in a fixed order
    memory: Tensor  # [N, C], the rows of the table
    rows: Tensor  # [F] int64, rising: the rows to score


@dataclass(frozen=True, slots=True, eq=False)
class _Waiting:
    """A choice whose training pass the strategy learns from."""

    plan: _Plan
    index: Tensor  # [K]
    candidates: Candidates
    memory: Tensor  # [N, C], with the scores of this step


class Selection:
    """Chooses the rows of each batch to train on, in any training loop.

    One process, or any number under an initialised default process group of ``torch.distributed``, on any device::

        selection = dissect_clip.Selection("warmup_base_sampling", rate=0.3, num_samples=M, epochs=E, warmup_point=2)
        for epoch in range(E):
            selection.start_epoch(epoch)
            for image, text, sample_id in loader:                        # sample_id [N] int64 in 0..M-1, fixed forever
                with torch.no_grad():
                    scored = model(image, text)
                choice = selection.choose(sample_id, scored["image_features"], scored["text_features"],
                                          scored["logit_scale"])
                out = model(image[choice.index], text[choice.index])     # the training pass, on K of N rows
                ...                                                      # loss (times choice.weight), backward, step

    What a strategy needs, :meth:`choose` must be given; what is missing is named in the error. Strategies that rank by
    a loss alone (``small_loss``, ``big_loss``) work for any model: ``choose(sample_id, loss=loss)``. Strategies
    without a scoring pass (``infobatch``, ``scan``) take ``choose(sample_id)``, and afterwards the losses of the
    training pass: ``learn(sample_id[choice.index], loss)``. With ``score_refresh`` below 1, and with
    ``clean_posterior``, only :meth:`rows_to_score` need a scoring pass, and :meth:`learn` takes the features of the
    training pass.

    Every rank calls every method in the same order with the same N. Choices depend on the seed, the step, the rank and
    the scores alone, so that a run that is resumed from :meth:`state_dict` chooses as the uninterrupted one would.
    ``rate * N`` rows are kept, at least one. A row whose score is not finite is neither kept nor remembered.

    Args:
        strategy: a name that ``--select-strategy`` takes, or several with weights: ``"small_loss:0.7+clipscore:0.3"``.
        rate: share of each batch to keep, in (0, 1].
        num_samples: M, samples of the dataset; the ids are 0 to M - 1.
        epochs: epochs of the whole run, on which schedules and warm-ups depend.
        seed: of every random choice.
        accumulate: batches that are chosen from before the first of them is learned from, as in gradient accumulation.
        device: of the table, 4 bytes a sample and column; by default that of the first batch, and the current GPU
            under NCCL.
        options: other settings of the selection and of the strategy, by the names of their flags: ``warmup_point=2``
            for ``--warmup-point 2``, ``score_refresh=0.1``, ``siglip=True`` for the sigmoid loss.

    Raises:
        ValueError: an unknown strategy or option, a value out of range, or options that contradict each other.
    """

    def __init__(
        self,
        strategy: str,
        *,
        rate: float,
        num_samples: int,
        epochs: int,
        seed: int = 0,
        accumulate: int = 1,
        device: torch.device | str | None = None,
        **options: Any,
    ) -> None:
        config = library_settings(strategy, rate, num_samples, epochs, seed, accumulate, options)
        try:
            self._set_up(build_strategy(config), config, num_samples, World.of_default_group(device))
        except SetupError as error:
            raise ValueError(str(error)) from error
        self._device_is_open = device is None and self.world.device.type == "cpu"
        self.draw_decoys(num_samples)

    @classmethod
    def from_strategy(cls, strategy: Strategy, config: Config, num_samples: int, world: World) -> Selection:
        """A selection by a strategy that is built already, among the processes of ``world``; without decoys yet.

        Raises:
            SetupError: if the strategy cannot rank by scores of earlier steps, and ``--score-refresh`` asks for it.
        """
        selection = cls.__new__(cls)
        selection._set_up(strategy, config, num_samples, world)
        return selection

    def _set_up(self, strategy: Strategy, config: Config, num_samples: int, world: World) -> None:
        refresh = config.selection.score_refresh
        exact = strategy.needs is Needs.NOTHING or (refresh in (None, 1) and not isinstance(strategy, ReusesScores))
        self.name = config.selection.select_strategy
        self.num_samples = num_samples
        self.strategy = strategy
        self.world = world
        self.seed = config.training.seed
        self.earlier = None if exact else EarlierScores(strategy, 1.0 if refresh is None else refresh)
        """The layout of scores of earlier steps, if samples are ranked by such; None if every row is scored."""
        columns = strategy.remembers if self.earlier is None else self.earlier.columns
        self.store = ScoreStore(num_samples, columns, world)
        self.epoch = -1  # before the first start_epoch
        self.step = 0  # batches chosen from, over the whole run
        self.survey: tuple[float, ...] = ()
        """What the strategy derived from the whole table when the epoch began; the same on all ranks."""
        self.decoys: Decoys | None = None
        """Samples with captions of others; only with strategies that ask for them."""
        self.not_finite = torch.zeros((), dtype=torch.int64, device=world.device)
        """Samples of this rank whose scores were not finite, on the device; the caller may set it back to 0."""
        self._siglip = config.model.siglip
        self._record = config.selection.record
        self._epochs = config.training.epochs
        self._accumulate = config.training.accum_freq
        self._device_is_open = False
        self._plan: _Plan | None = None
        self._waiting: deque[_Waiting] = deque()
        self._swapped = 0  # batches whose captions were swapped, and that were not chosen from yet
        self._resumed = False
        self._captions_are_lost = False

    # ---- once an epoch

    def start_epoch(self, epoch: int) -> None:
        """Begin epoch ``epoch`` (0-based), or continue in it after :meth:`load_state_dict`.

        Collective and a device sync, with strategies that look at the whole table between epochs.

        Raises:
            RuntimeError: :meth:`learn` was not called after the last choice.
        """
        self._check_learned()
        inside = self._resumed and epoch == self.epoch
        self.epoch, self._resumed, self._plan, self._swapped = epoch, False, None, 0
        decoys = self.decoys_in(epoch)
        if decoys is not None:
            decoys.agree()
            if self._captions_are_lost:
                log.warning(
                    "The checkpoint has no captions for these decoys, it was trained with others or without: P(clean) "
                    "needs some epochs until it is reliable. --seed and --clean-decoys decide which samples are decoys"
                )
        self._captions_are_lost = False
        if inside:  # what the strategy derived when this epoch began still holds
            return
        strategy = self.strategy
        if isinstance(strategy, SurveysAll):
            # Rank 0 looks for all: K may depend on it, and ranks on other hardware may round otherwise.
            self._use_survey(self.world.on_main(lambda: strategy.survey(self.store.scores, epoch)))
        if survey_summary(self.strategy):
            log.info("%s", survey_summary(self.strategy))

    def _use_survey(self, survey: Sequence[float]) -> None:
        self.survey = tuple(survey)
        self.strategy = with_survey(self.strategy, self.survey)
        if self.earlier is not None:
            self.earlier = dataclasses.replace(self.earlier, strategy=self.strategy)

    @property
    def learns_losses(self) -> bool:
        """Whether :meth:`learn` needs the losses of this epoch's training pass."""
        return learns_in(self.strategy, self.epoch) and self._is_read_later(self.epoch)

    @property
    def learns_features(self) -> bool:
        """Whether :meth:`learn` needs the features of the training pass."""
        return self.earlier is not None

    @property
    def needs_reference(self) -> bool:
        """Whether rows are scored by a reference model, too, in this epoch."""
        return Needs.REFERENCE in needs_in(self.strategy, self.epoch)

    def _is_read_later(self, epoch: int) -> bool:
        """Whether what is remembered in this epoch may be read in a later one."""
        later = range(epoch + 1, self._epochs)
        return bool(self.strategy.remembers) and any(may_select(self.strategy, each) for each in later)

    def _scores_in(self, epoch: int) -> bool:
        """Whether this epoch needs a scoring pass: not when everything is kept and nothing will be read back."""
        if self.strategy.needs is Needs.NOTHING:
            return False
        if self._record or self._is_read_later(epoch):
            return True
        return self.strategy.rate(epoch) < 1 and needs_in(self.strategy, epoch) is not Needs.NOTHING

    # ---- once a batch

    def rows_to_score(self, sample_id: Tensor, *, step: int | None = None, num_candidates: int | None = None) -> Tensor:
        """The rows [F] int64, rising, whose scores :meth:`choose` needs: all N, none, or some. No device sync.

        Calling it is optional: :meth:`choose` also takes the scores of all N rows, and uses those of these rows.
        ``step`` and ``num_candidates`` as in :meth:`choose`.
        """
        if self._plan is None or self._plan.sample_id is not sample_id or step not in (None, self._plan.step):
            self._plan = self._planned(sample_id, self.step if step is None else step, num_candidates)
        return self._plan.rows

    def _planned(self, sample_id: Tensor, step: int, num_candidates: int | None) -> _Plan:
        if self.epoch < 0 or self._resumed:
            raise RuntimeError("start_epoch was not called: call Selection.start_epoch(epoch) before the first batch")
        self._move_to(sample_id.device)
        check_ids(sample_id, self.num_samples)
        size, device = len(sample_id), sample_id.device
        generator = torch.Generator(device)
        generator.manual_seed(derive_seed(self.seed, Stream.SELECT, step, self.world.rank))
        memory = self.store.read(sample_id)
        num_candidates = size if num_candidates is None else num_candidates
        k = min(kept(self.strategy.rate(self.epoch), num_candidates), size)
        if self.earlier is None:
            rows = torch.arange(size if self._scores_in(self.epoch) else 0, device=device)
        else:
            count = min(self.earlier.fresh(self.epoch, num_candidates), size)
            if count in (0, size) or num_candidates > size:  # a loader that left samples out put those to score first
                rows = torch.arange(count, device=device)
            else:
                rows = self.earlier.stalest(memory, count, generator)
        return _Plan(sample_id, step, k, generator, memory, rows)

    def choose(
        self,
        sample_id: Tensor,
        image_features: Tensor | None = None,
        text_features: Tensor | None = None,
        logit_scale: Tensor | None = None,
        logit_bias: Tensor | None = None,
        *,
        similarity: Tensor | None = None,
        loss: Tensor | None = None,
        reference_image_features: Tensor | None = None,
        reference_text_features: Tensor | None = None,
        reference_logit_scale: Tensor | None = None,
        reference_logit_bias: Tensor | None = None,
        reference_loss: Tensor | None = None,
        step: int | None = None,
        num_candidates: int | None = None,
    ) -> Choice:
        """The rows of this rank's batch to train on, and their weights. No device sync.

        Collective if the strategy remembers scores (one all_gather of N rows of the table), or needs losses and is
        given features instead of ``loss`` (one all_gather of features). N is equal on all ranks.

        Features and losses are those of the model in training before this step, of all N rows or of
        :meth:`rows_to_score`. They are ignored in epochs that need none.

        Args:
            sample_id: [N] int64, in 0..M-1, each sample's fixed number in the dataset.
            image_features: [N, D], unit norm.
            text_features: [N, D], unit norm.
            logit_scale: scalar, the factor itself and not its logarithm.
            logit_bias: scalar, with ``siglip=True``.
            similarity: [N] cosine of each pair, in [-1, 1], instead of the features.
            loss: [N] in nats, instead of the contrastive loss by the features against the pairs of all ranks.
            reference_image_features: the same under a frozen reference model, for ``learnability`` and ``jest``.
            reference_text_features: likewise.
            reference_logit_scale: likewise.
            reference_logit_bias: likewise.
            reference_loss: likewise.
            step: number of the batch in the whole run, if the caller counts batches; with the seed and the rank it
                decides every random choice. By default batches are counted here.
            num_candidates: samples that the batch was chosen from before loading; by default N.

        Raises:
            RuntimeError: :meth:`start_epoch`, :meth:`learn` or :meth:`swap_captions` was not called.
            ValueError: something that the strategy needs is missing, or a shape, a dtype or an id is wrong.
        """
        counted = step is None
        self.rows_to_score(sample_id, step=step, num_candidates=num_candidates)
        plan, self._plan = self._plan, None
        assert plan is not None
        self._check_learned(self._accumulate)
        self._check_swapped()
        scores = PairScores.of(image_features, text_features, logit_scale, logit_bias, similarity, loss)
        reference = PairScores.of(
            reference_image_features,
            reference_text_features,
            reference_logit_scale,
            reference_logit_bias,
            None,
            reference_loss,
        )
        memory, usable = plan.memory, None
        with torch.no_grad():
            if len(plan.rows) > 0:
                self._check_given(scores, reference, plan)
                scores, reference = (part.at(plan.rows, len(sample_id)) for part in (scores, reference))
                if counted and self.step == 0:
                    scores.check_unit_norm()
            if self.earlier is not None:
                candidates, memory, usable = self._rank_by_earlier(self.earlier, plan, scores)
            elif len(plan.rows) > 0:
                candidates, usable = current_candidates(
                    Candidates(epoch=self.epoch, generator=plan.generator, memory=memory),
                    scores,
                    reference,
                    needs_in(self.strategy, self.epoch),
                    SampleLoss(self.world, self._siglip),
                )
            else:
                candidates = Candidates(epoch=self.epoch, generator=plan.generator, memory=memory)
            index = self._best(candidates, plan, usable)
            if self.earlier is None:
                self._remember(candidates, plan, usable)
            if usable is not None:
                self.not_finite += (~usable).sum()
                index = replace_unusable(index, usable)
            weight = self.strategy.weights(candidates, index) if plan.k < len(sample_id) else None
            reported = None
            if self._record and isinstance(self.strategy, ReportsSamples):
                reported = self.strategy.report(candidates)
        if self.learns_features or self.learns_losses:
            self._waiting.append(_Waiting(plan, index, candidates, memory))
        self.step = plan.step + 1
        self._swapped = max(0, self._swapped - 1)
        remembers_alone = self.strategy.needs is Needs.NOTHING and bool(self.strategy.remembers)
        is_known = usable is not None or self.earlier is not None or remembers_alone
        return Choice(index, weight, len(plan.rows), usable, candidates if is_known else None, reported)

    def _best(self, candidates: Candidates, plan: _Plan, usable: Tensor | None) -> Tensor:
        """The K rows with the highest rank."""
        size = len(plan.sample_id)
        if plan.k == size:
            # Keeping all keeps the order, too: it is then bit for bit the batch that was loaded.
            return torch.arange(size, device=plan.sample_id.device)
        rank = self.strategy.rank(candidates) if self.earlier is None else self.earlier.rank(candidates)
        return top_k(rank if usable is None else rank.where(usable, torch.nan), plan.k, plan.generator)

    def _rank_by_earlier(
        self, earlier: EarlierScores, plan: _Plan, scores: PairScores
    ) -> tuple[Candidates, Tensor, Tensor | None]:
        """Candidates by the last scores of each sample, the rows [N, C] with the new ones, and which are finite."""
        memory, usable = plan.memory, None
        if len(plan.rows) > 0:
            image, text = scores.image_features, scores.text_features
            assert image is not None
            assert text is not None
            z = pair_z(image, text, self.strategy.needs)
            finite = (image * text).sum(dim=1).isfinite()
            usable = torch.ones(len(plan.sample_id), dtype=torch.bool, device=memory.device)
            usable = usable.index_copy(0, plan.rows, finite)
            memory = memory.index_copy(0, plan.rows, earlier.updated(memory[plan.rows], z, plan.step))
        return earlier.candidates(memory, self.epoch, plan.generator), memory, usable

    def _remember(self, candidates: Candidates, plan: _Plan, usable: Tensor | None) -> None:
        """Store what the strategy remembers of the scores of this step. Collective where it does."""
        # Not asked if it would look at scores that were not computed.
        asked = usable is not None or (
            self.strategy.needs is Needs.NOTHING and not isinstance(self.strategy, LearnsFromTraining)
        )
        values = self.strategy.remember(candidates) if asked else None
        if values is not None:
            values = values if usable is None else values.where(usable[:, None], candidates.memory)
            self.store.write(plan.sample_id, values)

    # ---- after the training pass

    def pair_losses(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor | None = None
    ) -> Tensor:
        """The contrastive loss [K] in nats of pairs by their features [K, D], unit norm, against those of all ranks.

        Detached; NaN for pairs whose features are not finite, which count for no other pair. Collective: one
        all_gather of features. No device sync.
        """
        with torch.no_grad():
            image, text = image_features.detach().float(), text_features.detach().float()
            finite = (image * text).sum(dim=1, keepdim=True).isfinite()
            image, text = image.where(finite, 0), text.where(finite, 0)
            bias = None if logit_bias is None else logit_bias.detach().float()
            loss = SampleLoss(self.world, self._siglip)(image, text, logit_scale.detach().float(), bias)
            return loss.where(finite[:, 0], torch.nan)

    def learn(
        self,
        sample_id: Tensor,
        loss: Tensor | None = None,
        *,
        image_features: Tensor | None = None,
        text_features: Tensor | None = None,
        logit_scale: Tensor | None = None,
        logit_bias: Tensor | None = None,
    ) -> None:
        """Take what the training pass computed for the rows of a choice. Collective where it counts: one all_gather.

        Once for each :meth:`choose`, in the same order. In epochs in which the strategy learns nothing the call has no
        effect, and may be left out. No device sync.

        Args:
            sample_id: [K] int64, the ids of the chosen rows, ``sample_id[choice.index]``.
            loss: [K] in nats, before any weight, for strategies that learn from losses (:attr:`learns_losses`).
            image_features: [K, D], unit norm, for strategies that learn from features (:attr:`learns_features`); with
                ``logit_scale`` also instead of ``loss``.
            text_features: [K, D], likewise.
            logit_scale: scalar, the factor itself.
            logit_bias: scalar, with ``siglip=True``.

        Raises:
            RuntimeError: there is no choice that waits for it.
            ValueError: these are not the rows that were chosen, or what the strategy learns from is missing.
        """
        if not (self.learns_features or self.learns_losses):
            return
        if not self._waiting:
            raise RuntimeError("learn was called without a choice before it: call Selection.choose first")
        waiting = self._waiting.popleft()
        chosen = waiting.plan.sample_id[waiting.index]
        if sample_id.shape != chosen.shape or (sample_id.device.type == "cpu" and not torch.equal(sample_id, chosen)):
            raise ValueError("learn takes the ids of the rows of the oldest choice: sample_id[choice.index]")
        with torch.no_grad():
            if self.earlier is not None:
                if image_features is None or text_features is None:
                    raise ValueError(self._missing("learn", "image_features and text_features of the training pass"))
                self._learn_features(self.earlier, waiting, image_features.detach(), text_features.detach())
                return
            if loss is None:
                if image_features is None or text_features is None or logit_scale is None:
                    raise ValueError(self._missing("learn", "loss"))
                loss = self.pair_losses(image_features, text_features, logit_scale, logit_bias)
            if loss.shape != chosen.shape:
                raise ValueError(f"learn: loss is {list(loss.shape)}, and {list(chosen.shape)} rows were chosen")
            self._learn_losses(waiting, chosen, loss.detach().float())

    def _learn_losses(self, waiting: _Waiting, chosen: Tensor, loss: Tensor) -> None:
        memory = waiting.candidates.memory[waiting.index]
        values = self.strategy.remember(dataclasses.replace(waiting.candidates, memory=memory, loss=loss))
        if values is not None:
            self.store.write(chosen, values.where(loss.isfinite()[:, None], memory))

    def _learn_features(self, earlier: EarlierScores, waiting: _Waiting, image: Tensor, text: Tensor) -> None:
        """Store the new scores, of the scoring pass and of the training pass."""
        plan, memory = waiting.plan, waiting.memory
        z = pair_z(image, text, self.strategy.needs)
        memory = memory.index_copy(0, waiting.index, earlier.updated(memory[waiting.index], z, plan.step))
        places = torch.cat([plan.rows, waiting.index])
        ids, new = plan.sample_id[places], memory[places]
        candidates = earlier.candidates(new, waiting.candidates.epoch, plan.generator)
        decoys = self.decoys_in(candidates.epoch)
        if decoys is not None:
            candidates = dataclasses.replace(candidates, decoy=decoys.among(ids))
        remembered = self.strategy.remember(candidates)
        if remembered is not None:
            new = torch.cat([remembered, new[:, remembered.shape[1] :]], dim=1)
        scored = (new[:, -1] == plan.step)[:, None]  # not so if neither pass gave a finite score
        self.store.write(ids, new.where(scored, self.store.read(ids)))

    # ---- decoys

    def draw_decoys(self, subset_size: int, subset_ids: Callable[[Tensor], Tensor] = lambda numbers: numbers) -> None:
        """Draw the samples that the strategy wants to have captions of others, if it wants any.

        Among the ``subset_size`` samples that are trained on, whose ids [n] ``subset_ids`` gives by their numbers [n];
        by default all samples. To be called before the first epoch.
        """
        strategy = self.strategy
        if not isinstance(strategy, UsesDecoys) or strategy.decoy_share == 0:
            return
        strategy.decoy_ids = subset_ids(decoy_ids(subset_size, strategy.decoy_share, self.seed))
        self.decoys = Decoys(strategy.decoy_ids, self.world) if len(strategy.decoy_ids) > 0 else None

    def decoys_in(self, epoch: int) -> Decoys | None:
        """The decoys, in an epoch in which they have captions of others."""
        return self.decoys if isinstance(self.strategy, UsesDecoys) and self.strategy.has_decoys_in(epoch) else None

    def swap_captions(self, sample_id: Tensor, text: Tensor) -> Tensor:
        """Captions [N, L] int64 in which those of the decoys among ``sample_id`` [N] are replaced by others'.

        ``clean_posterior`` estimates the share of mismatched pairs from a few samples with captions that are wrong on
        purpose. Call it for every batch, before scoring and training, once for each :meth:`choose`; returns ``text``
        itself in epochs without decoys and with other strategies. Not collective, no device sync.
        """
        decoys = self.decoys_in(self.epoch)
        if decoys is None:
            return text
        self._move_to(sample_id.device)
        self._swapped += 1
        return decoys.swap_captions(sample_id, text)

    # ---- state

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs to choose as this one would: plain values and tensors.

        Loads with ``torch.load(..., weights_only=True)``. Equal on all ranks except for the device of the tensors, so
        that one rank may save it. Collective with decoys (two all_reduces and an all_gather). Keys:

        - ``strategy``: its name; ``columns``: names of the table's columns; ``num_samples``: M.
        - ``scores``: [M, C] float32, the table itself, not a copy; NaN = never seen.
        - ``depends_on``: settings that the meaning of the scores depends on, as text.
        - ``survey``: what the strategy derived from the table when ``epoch`` began, a tuple of floats; ``survey_of``:
          settings that say what these numbers mean, as text.
        - ``epoch``: the epoch of the last :meth:`start_epoch`, -1 before the first; ``step``: batches chosen from.
        - ``decoy_captions``: [P + W, L] int32 or None, see :attr:`Decoys.captions`; ``world_size``: W.

        Raises:
            RuntimeError: :meth:`learn` was not called after the last choice.
        """
        self._check_learned()
        decoys = self.decoys_in(self.epoch)
        if decoys is not None:
            decoys.agree(adopt=False)
        return {
            "strategy": self.name,
            "num_samples": self.num_samples,
            "columns": self.store.columns,
            "scores": self.store.scores,
            "depends_on": memory_settings(self.strategy),
            "survey": self.survey,
            "survey_of": survey_format(self.strategy),
            "epoch": self.epoch,
            "step": self.step,
            "world_size": self.world.size,
            "decoy_captions": None if decoys is None else decoys.captions,
        }

    def misfits(self, state: Mapping[str, Any]) -> list[str]:
        """Why this selection cannot continue from ``state``, a sentence each; empty if it can.

        ``depends_on`` and ``survey_of`` may be None in states of older versions, which did not store them.
        """
        if state["strategy"] != self.name:
            return [f"it was trained with --select-strategy {state['strategy']}, this run has {self.name}"]
        columns, expected = tuple(state["columns"]), self.store.columns
        if columns != expected:
            wanted = f"--select-strategy {self.name} with this --score-refresh needs {', '.join(expected) or 'none'}"
            return [f"its scores are {', '.join(columns) or 'none'}; {wanted}"]
        found = []
        if state["num_samples"] != self.num_samples:
            found.append(f"it was trained on {state['num_samples']} samples, this run has {self.num_samples}")
        elif columns and (state["scores"] is None or state["scores"].shape != self.store.scores.shape):
            found.append(f"it has no scores for --select-strategy {self.name}")
        if state["depends_on"] not in (None, memory_settings(self.strategy)):
            now = memory_settings(self.strategy) or "none of them"
            found.append(f"its scores were computed with {state['depends_on'] or 'none of them'}, this run has {now}")
        if state["survey"] and (
            len(state["survey"]) != len(survey_names(self.strategy))
            or state["survey_of"] not in (None, survey_format(self.strategy))
        ):
            kind = f" by {survey_format(self.strategy)}" if survey_format(self.strategy) else ""
            found.append(
                f"it holds {len(state['survey'])} numbers by {state['survey_of']} about the whole dataset, this run "
                f"expects {len(survey_names(self.strategy))}{kind}"
            )
        return found

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state``, by :meth:`start_epoch` for the same epoch or the next. Not collective.

        Any number of ranks may continue from it.

        Raises:
            ValueError: the state does not fit; everything that differs is named (:meth:`misfits`).
        """
        found = self.misfits(state)
        if found:
            raise ValueError("the state of the selection does not fit: " + "; ".join(found))
        if self.store.columns:
            self.store.load_state_dict({"columns": tuple(state["columns"]), "scores": state["scores"]})
        if state["survey"]:
            self._use_survey(state["survey"])
        self.epoch, self.step, self._resumed = state["epoch"], state["step"], True
        self._plan, self._swapped = None, 0
        self._waiting.clear()
        if self.decoys is not None and self.epoch >= 0:
            captions = state["decoy_captions"]
            self._captions_are_lost = captions is None or not self.decoys.load(captions, state["world_size"])

    def continue_at(self, step: int) -> None:
        """Count batches from ``step`` on, in a run that resumes with batches of another size.

        The numbers of the batches in which scores were computed are scaled, so that they stay in order and below it.
        """
        if self.earlier is not None and self.step > 0:
            self.store.scores[:, -1] *= step / self.step
        self.step = step

    # ---- checks that cost no device sync

    def _check_learned(self, room: int = 1) -> None:
        if len(self._waiting) >= room:
            more = "" if self._accumulate > 1 else "; with gradient accumulation give accumulate="
            raise RuntimeError(
                f"learn was not called after the last choice: {self.name} learns from the training pass. Call "
                f"Selection.learn(sample_id[choice.index], ...) after each training pass{more}"
            )

    def _check_swapped(self) -> None:
        if self._swapped == 0 and self.decoys_in(self.epoch) is not None:
            raise RuntimeError(
                f"swap_captions was not called: in this epoch {self.name} needs a few samples with captions of others. "
                "Replace the captions of every batch by Selection.swap_captions(sample_id, text) before scoring and "
                "training, or give clean_decoys=0, which detects mismatched pairs less reliably"
            )

    def _missing(self, method: str, part: str) -> str:
        return f"Selection.{method}: {self.name} needs {part}"

    def _check_given(self, scores: PairScores, reference: PairScores, plan: _Plan) -> None:
        """See that all that the strategy looks at is there, with a row for each of the batch or of those asked for."""
        if self.earlier is not None:
            needs = Needs.FEATURES  # z-scores are against the other pairs of the batch
        else:
            needs = needs_in(self.strategy, self.epoch)
        sides = [("", scores)]
        if Needs.REFERENCE in needs:
            sides.append(("reference_", reference))
        for prefix, given in sides:
            for part in given.missing(needs, prefix, with_logits=self.earlier is None, siglip=self._siglip):
                raise ValueError(self._missing("choose", part))
            given.check_shapes(prefix, {len(plan.sample_id), len(plan.rows)})

    # ---- placement

    def _move_to(self, device: torch.device) -> None:
        """Put the table on the device of the first batch, unless a device was given."""
        if not self._device_is_open:
            return
        self._device_is_open = False
        if device != self.world.device:
            self.world = dataclasses.replace(self.world, device=device)
            self.store.move_to(self.world)
            self.not_finite = self.not_finite.to(device)
            if self.decoys is not None:
                self.decoys.move_to(self.world)

    @property
    def scoring(self) -> str:
        """What is scored, for the log."""
        if self.earlier is not None:
            refresh = self.earlier.refresh
            when = "" if isinstance(self.strategy, ReusesScores) else " after the first epoch"
            return f"{f'{refresh:g} of it is' if refresh > 0 else 'nothing is'} scored{when}"
        if Needs.REFERENCE in self.strategy.needs:
            return "every sample is scored by two models in every step after the warm-up, if there is one"
        return "nothing is scored" if self.strategy.needs is Needs.NOTHING else "every sample is scored in every step"
