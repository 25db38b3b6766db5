"""DivBS: pairs whose gradients together span most of the whole batch's, each counted without what the others say.

Hong et al., "Diversified Batch Selection for Training Acceleration", ICML 2024, section 3. The orthogonalised
representativeness of a subset is what an orthonormal basis of its gradients catches of the sum of all gradients. It is
built up greedily: the best candidate is taken, and its direction is taken out of the sum, before the next is looked
for.

Shapes: N candidates of this rank, K picked, D features, M numbers to a candidate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dissect_clip.selection.pairs import learner_logits, loss_gradient
from dissect_clip.selection.strategy import Candidates, Needs, Strategy, in_order, kept, required

_SPENT = 1e-10
"""Share of a vector's squared length below which what is left of it is rounding."""


def greedy_span(vectors: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` of ``vectors`` [N, M] that are picked, [K] int64 in their order, and what a next one gives, [N].

    Each pick has the largest dot product, as an absolute value, with the part of the sum of all vectors that the picks
    before it do not span (the paper's simplified rule). Ties go to the first. No device sync.

    Everything is computed from the dot products of the vectors: a Cholesky factorisation that picks its pivots by this
    rule, O(N K) a pick whatever M is. In float64, as what is left of a vector would drown in the rounding of TF32.
    """
    vectors = vectors.double()
    products = vectors @ vectors.T
    left = products.diagonal().clone()  # squared length of the part that the picks do not span
    floor = (_SPENT * left).clamp(min=torch.finfo(left.dtype).tiny)
    along = products.sum(dim=1)  # dot product with what is left of the sum
    basis = products.new_zeros(count, len(vectors))  # dot products with an orthonormal basis of the picks
    picked = torch.zeros_like(left)
    picks = []
    for number in range(count):
        gain = along.square()
        pick = (gain + picked).argmax(dim=0, keepdim=True)
        picks.append(pick)
        picked.index_fill_(0, pick, -torch.inf)
        before = basis[:number]
        row = products.index_select(0, pick)[0] - before.index_select(1, pick)[:, 0] @ before
        scale = left.maximum(floor).index_select(0, pick).rsqrt()
        torch.mul(row, scale, out=basis[number])
        along.addcmul_(basis[number], along.index_select(0, pick) * scale, value=-1)
        left.addcmul_(basis[number], basis[number], value=-1)
    return torch.cat(picks), along.square()


def feature_gradients(candidates: Candidates, sigmoid: bool) -> Tensor:
    """What the loss of the candidates, as a batch, sends back into each pair's image and text features, [N, 2 D].

    With respect to the features before they are scaled to unit norm, at unit norm: without the part along the features
    themselves, of which the towers see nothing.
    """
    image, text = required(candidates.image_features), required(candidates.text_features)
    table = required(candidates.logit_scale) * loss_gradient(learner_logits(candidates), sigmoid)
    parts = ((table @ text, image), (table.T @ image, text))
    return torch.cat([part - (part * own).sum(dim=1, keepdim=True) * own for part, own in parts], dim=1)


class DivBS(Strategy):
    """DivBS: pairs whose gradients span most of the batch's, counting what they share once"""

    needs = Needs.FEATURES

    def rank(self, candidates: Candidates) -> Tensor:
        vectors = feature_gradients(candidates, self.run.siglip)
        return in_order(*greedy_span(vectors, kept(self.rate(candidates.epoch), len(vectors))))
