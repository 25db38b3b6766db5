"""What a strategy may want of a run beyond the six members of :class:`Strategy`, a mixin for each wish.

===================  ==================================================================================================
``WarmsUp``          samples uniformly, at a separate rate, in the first epochs
``UsesReference``    compares the model with a frozen reference model
``VariesNeeds``      needs less in some epochs than ``needs`` says
``LearnsFromTraining``  remembers the losses of the training pass
``WeightsSamples``   multiplies the losses of selected samples by factors
``SurveysAll``       looks at the whole store before every epoch
``ReportsSamples``   adds columns to the record, and writes a file about every sample at the end of a run
``UsesDecoys``       trains some samples with wrong captions, to estimate what mismatched pairs look like
``ReusesScores``     ranks by scores of earlier steps, and can start without any
===================  ==================================================================================================

The functions at the end answer the same questions for any strategy.

Shapes: N pairs of this rank, C columns that the strategy remembers, M samples, P decoys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

from torch import Tensor

from dissect_clip.selection.schedule import select_rate
from dissect_clip.selection.strategies.options import ReferenceOptions, WarmupOptions
from dissect_clip.selection.strategy import Candidates, Needs, Strategy

S = TypeVar("S", bound="SurveysAll")


class WarmsUp(Strategy):
    """Samples uniformly, at a separate rate, for ``--warmup-point`` epochs."""

    Options = WarmupOptions
    options: WarmupOptions

    def warms_up(self, epoch: int) -> bool:
        """Whether this epoch (0-based) is one of those."""
        return epoch < self.options.warmup_epochs

    def rate(self, epoch: int) -> float:
        rate = self.options.warmup_select_rate
        if self.warms_up(epoch):
            return self.run.select_rate if rate is None else rate
        return select_rate(self.run, epoch, first=self.options.warmup_epochs)


class VariesNeeds(Strategy):
    """Needs less in some epochs than ``needs`` says."""

    def needs_in(self, epoch: int) -> Needs:
        """The part of ``needs`` that is used in this epoch (0-based)."""
        raise NotImplementedError


class UsesReference(WarmsUp, VariesNeeds):
    """Compares the model with a frozen reference model.

    That is a given one (``--select-reference``), or the model in training as it is after a warm-up.
    """

    Options = ReferenceOptions
    options: ReferenceOptions

    def needs_in(self, epoch: int) -> Needs:
        return Needs.NOTHING if self.warms_up(epoch) else self.needs

    def rank(self, candidates: Candidates) -> Tensor:
        if self.warms_up(candidates.epoch):
            return candidates.memory.new_zeros(len(candidates.memory))
        return self.rank_against_reference(candidates)

    def rank_against_reference(self, candidates: Candidates) -> Tensor:
        """[N] float, see :meth:`Strategy.rank`; called when there is a reference."""
        raise NotImplementedError


class LearnsFromTraining(Strategy):
    """Remembers the losses of the training pass: ``remember`` is given them, for the samples that were trained on."""

    def learns_in(self, epoch: int) -> bool:
        """Whether it uses the losses of this epoch (0-based)."""
        return True


class WeightsSamples(Strategy):
    """Multiplies the losses of selected samples by factors, which ``weights`` gives."""

    @property
    def weights_losses(self) -> bool:
        """Whether ``weights`` may give factors with these options."""
        return True


class SurveysAll(Strategy):
    """Looks at the whole store before every epoch, and ranks by what it finds there."""

    survey_names: tuple[str, ...] = ()
    """Names of the S numbers of a survey."""

    survey_format: str = ""
    """What the S numbers mean, as written to checkpoints: one with another format is not resumed inside an epoch."""

    def survey(self, memory: Tensor, epoch: int) -> Sequence[float]:
        """S numbers about the whole store [M, C] before this epoch (0-based). Computed on rank 0 for all ranks."""
        raise NotImplementedError

    def with_survey(self: S, survey: Sequence[float]) -> S:
        """This strategy with the numbers [S] of a survey."""
        raise NotImplementedError

    @property
    def summary(self) -> str:
        """A sentence on the last survey, for the log; empty if there is nothing to report."""
        return ""

    def may_select(self, epoch: int) -> bool:
        """Whether this epoch may leave samples out, as far as that is known before its survey."""
        return self.rate(epoch) < 1

    @property
    def rate_summary(self) -> str:
        """The share of every batch that is kept over the epochs, for the log."""
        return rate_range(self)


class ReportsSamples(Strategy):
    """Adds columns to the record, and writes a file about every sample at the end of a run."""

    sample_columns: tuple[str, ...] = ()
    """Names of the P columns of the record that :meth:`report` gives."""

    report_file: str = ""
    """Name of the Parquet file in the run folder that holds :meth:`sample_report`; empty for no file."""

    def report(self, candidates: Candidates) -> Tensor:
        """[N, P] float32 for the record, by the same candidates that ``rank`` is given; NaN for unknown values."""
        raise NotImplementedError

    def sample_report(self, memory: Tensor, ids: Tensor, num_samples: int, epoch: int) -> Mapping[str, Tensor]:
        """Columns by name [M] of ``report_file``, for the rows ``memory`` [M, C] of the samples ``ids`` [M].

        After ``epoch`` epochs. Unknown values are NaN. Columns whose names end in ``visits`` or ``epoch`` hold whole
        numbers, those whose names begin with ``is_`` hold truth values.
        """
        raise NotImplementedError


class UsesDecoys(Strategy):
    """Trains some samples with wrong captions in some epochs, to estimate what mismatched pairs look like."""

    decoy_ids: Tensor | None = None
    """[P] int64, rising: the samples with wrong captions in this run; None before they are drawn."""

    @property
    def decoy_share(self) -> float:
        """The share of the samples that are decoys."""
        raise NotImplementedError

    def has_decoys_in(self, epoch: int) -> bool:
        """Whether the decoys have their wrong captions in this epoch (0-based)."""
        raise NotImplementedError

    @property
    def decoy_settings(self) -> str:
        """The flags, with their values, that decide which samples are decoys; empty without decoys."""
        raise NotImplementedError


class ReusesScores(Strategy):
    """Ranks by scores of earlier steps whatever ``--score-refresh`` is, and can start without any."""


def needs_in(strategy: Strategy, epoch: int) -> Needs:
    """The part of a strategy's ``needs`` that is used in this epoch (0-based)."""
    return strategy.needs_in(epoch) if isinstance(strategy, VariesNeeds) else strategy.needs


def may_select(strategy: Strategy, epoch: int) -> bool:
    """Whether this epoch (0-based) may leave samples out, as far as that is known before the run."""
    return strategy.may_select(epoch) if isinstance(strategy, SurveysAll) else strategy.rate(epoch) < 1


def learns_in(strategy: Strategy, epoch: int) -> bool:
    """Whether a strategy uses the losses of this epoch's (0-based) training pass."""
    return isinstance(strategy, LearnsFromTraining) and strategy.learns_in(epoch)


def weights_losses(strategy: Strategy) -> bool:
    """Whether a strategy may multiply the losses of samples by factors."""
    return isinstance(strategy, WeightsSamples) and strategy.weights_losses


def memory_settings(strategy: Strategy) -> str:
    """The flags, with their values, on which the meaning of what a strategy remembers depends; empty without any."""
    return strategy.decoy_settings if isinstance(strategy, UsesDecoys) else ""


def survey_names(strategy: Strategy) -> tuple[str, ...]:
    """Names of the numbers that a strategy finds in the whole store; none for most."""
    return strategy.survey_names if isinstance(strategy, SurveysAll) else ()


def survey_format(strategy: Strategy) -> str:
    """What the numbers of a strategy's survey mean, as written to checkpoints."""
    return strategy.survey_format if isinstance(strategy, SurveysAll) else ""


def with_survey(strategy: Strategy, survey: Sequence[float]) -> Strategy:
    """The strategy with the numbers of a survey; itself if it surveys nothing."""
    return strategy.with_survey(survey) if isinstance(strategy, SurveysAll) and survey else strategy


def survey_summary(strategy: Strategy) -> str:
    """A sentence on the last survey, for the log; empty if there is nothing to report."""
    return strategy.summary if isinstance(strategy, SurveysAll) else ""


def sample_columns(strategy: Strategy) -> tuple[str, ...]:
    """Names of the columns that a strategy adds to the record."""
    return strategy.sample_columns if isinstance(strategy, ReportsSamples) else ()


def rate_range(strategy: Strategy) -> str:
    """The smallest and the largest share of a batch that is kept over the epochs, as text."""
    rates = sorted({strategy.rate(epoch) for epoch in range(strategy.run.epochs)})
    return " to ".join(f"{rate:g}" for rate in rates if rate in (rates[0], rates[-1])) or "nothing"


def rate_summary(strategy: Strategy) -> str:
    """The share of every batch that is kept over the epochs, for the log."""
    return strategy.rate_summary if isinstance(strategy, SurveysAll) else rate_range(strategy)
