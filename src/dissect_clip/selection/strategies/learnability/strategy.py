"""Learnability: what the model in training has still to learn, told by a reference model that has learned it.

Mindermann et al., "Prioritized Training on Points that are Learnable, Worth Learning, and Not Yet Learnt", ICML 2022
(RHO-LOSS): keep the largest loss minus reference loss. Evans et al., "Data curation via joint example selection further
accelerates multimodal learning", NeurIPS 2024 (JEST), section 3: the loss of a pair depends on the pairs beside it, so
the pairs to train on are drawn one chunk after the other, by their learnability among those drawn already.

Shapes: N candidates of this rank, K chosen, J of them in a chunk.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dissect_clip.selection.mixins import UsesReference
from dissect_clip.selection.pairs import learner_logits, reference_logits, sigmoid_losses
from dissect_clip.selection.strategies.learnability.options import JestOptions
from dissect_clip.selection.strategy import Candidates, Needs, in_order, kept, required

Among = Callable[[Tensor], Tensor]
"""Told the places [J] int64 of one more chunk; returns the learnability [N] among all chunks it was told of."""


class Learnability(UsesReference):
    """largest loss minus the loss of a reference model (RHO-LOSS)"""

    needs = Needs.LOSS | Needs.REFERENCE

    def rank_against_reference(self, candidates: Candidates) -> Tensor:
        return required(candidates.loss) - required(candidates.reference_loss)


def sigmoid_learnability(learner: Tensor, reference: Tensor) -> tuple[Tensor, Among]:
    """Learnability [N] of each pair alone, and among chosen ones, from the logits [N, N] of both models: sigmoid loss.

    Among others a pair adds its image with their captions and its caption with their images (Evans et al., algorithm
    1), so that what all chosen add up to is the learnability of their sub-batch.
    """
    table = sigmoid_losses(learner) - sigmoid_losses(reference)
    mutual = table + table.T
    total = table.diagonal().clone()

    def among(chunk: Tensor) -> Tensor:
        return total.add_(mutual.index_select(1, chunk).sum(dim=1))

    return table.diagonal(), among


def softmax_learnability(learner: Tensor, reference: Tensor) -> tuple[Tensor, Among]:
    """As :func:`sigmoid_learnability`, for InfoNCE: a chosen pair is a negative in the normalisers of the others.

    Alone a pair has its own logits only; among others the normalisers over those are added, of both directions and of
    both models (Evans et al., appendix).
    """
    alone = reference.diagonal() - learner.diagonal()
    tables = (learner, learner.T, reference, reference.T)
    normalisers = [torch.full_like(alone, -torch.inf) for _ in tables]

    def among(chunk: Tensor) -> Tensor:
        for place, table in enumerate(tables):
            new = table.index_select(1, chunk).logsumexp(dim=1)
            normalisers[place] = torch.logaddexp(normalisers[place], new)
        rows, columns, reference_rows, reference_columns = normalisers
        return alone + (rows + columns - reference_rows - reference_columns) / 2

    return alone, among


def chunk_sizes(count: int, chunks: int) -> list[int]:
    """``count`` split into at most ``chunks`` parts of at least 1, as even as can be, the larger ones first."""
    chunks = min(count, chunks)
    return [count // chunks + (number < count % chunks) for number in range(chunks)]


def draw_chunks(alone: Tensor, among: Among, sizes: list[int], noise: Tensor | None) -> tuple[Tensor, Tensor]:
    """Places [K] int64 in the order that they are drawn in, and the learnability [N] among all but the last chunk.

    A chunk is the largest of learnability plus ``noise`` [N] of its own, a row of [chunks, N]. With Gumbel noise that
    is a draw without replacement, with probabilities that go with the exponential of the learnability; without noise
    it is the best.
    """
    learnability, chosen = alone, torch.zeros_like(alone)
    drawn: list[Tensor] = []
    for number, size in enumerate(sizes):
        learnability = among(drawn[-1]) if drawn else alone
        score = learnability if noise is None else learnability + noise[number]
        drawn.append((score + chosen).topk(size).indices)
        chosen.index_fill_(0, drawn[-1], -torch.inf)
    return torch.cat(drawn), learnability


class Jest(UsesReference):
    """JEST: a sub-batch that is learnable as a whole, drawn in chunks by loss minus the loss of a reference model"""

    Options = JestOptions
    options: JestOptions
    needs = Needs.FEATURES | Needs.REFERENCE

    def rank_against_reference(self, candidates: Candidates) -> Tensor:
        learnability = sigmoid_learnability if self.run.siglip else softmax_learnability
        alone, among = learnability(learner_logits(candidates), reference_logits(candidates))
        sizes = chunk_sizes(kept(self.rate(candidates.epoch), len(alone)), self.options.jest_chunks)
        noise = self._noise(candidates, len(sizes)) / self.options.jest_gain
        return in_order(*draw_chunks(alone, among, sizes, noise))

    @staticmethod
    def _noise(candidates: Candidates, chunks: int) -> Tensor:
        """[chunks, N] of the standard Gumbel distribution."""
        size = (chunks, len(candidates.memory))
        return -candidates.memory.new_empty(size).exponential_(generator=candidates.generator).log()
