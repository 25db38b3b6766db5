import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dissect_clip.evaluation.metrics import (
    accuracy,
    average_precision,
    best_rank,
    class_counts,
    contrastive_loss,
    full_float32,
    rank_metrics,
    retrieval_metrics,
    similarity,
)


def unit(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def sorted_rank(similarity: Tensor, own: Tensor) -> list[int]:
    """The definition: sort every row, falling and stable, and look for the first own candidate."""
    order = similarity.argsort(dim=1, descending=True, stable=True)
    return [int(row[places].nonzero()[0, 0]) for row, places in zip(own, order, strict=True)]


def test_best_rank_is_the_place_in_a_stable_sort():
    generator = torch.Generator().manual_seed(0)
    similarity = torch.randint(0, 4, (40, 30), generator=generator).float()  # full of ties
    own = torch.rand(40, 30, generator=generator) < 0.1
    own[:, 7] = True
    assert best_rank(similarity, own).tolist() == sorted_rank(similarity, own)


def test_equal_candidates_rank_by_position():
    own = torch.eye(9, dtype=torch.bool)
    assert best_rank(torch.ones(9, 9), own).tolist() == list(range(9))


def test_a_model_that_maps_everything_to_one_point_is_at_chance():
    point = unit(1, 513)
    ranks = [best_rank(similarity(point, point.expand(50, -1)), torch.arange(50)[None] == i) for i in range(50)]
    assert torch.cat(ranks).tolist() == list(range(50))


def test_the_best_placed_of_several_own_candidates_counts():
    similarity = torch.tensor([[0.1, 0.9, 0.5, 0.7]])
    assert best_rank(similarity, torch.tensor([[True, False, True, False]])).tolist() == [2]


@pytest.mark.parametrize("count", [11, 12])
def test_metrics_equal_openclips(count):
    from open_clip_train.train import get_clip_metrics

    image, text = unit(count, 8, seed=1), unit(count, 8, seed=2)
    theirs = get_clip_metrics(image, text, torch.tensor(100.0))
    own = torch.eye(count, dtype=torch.bool)
    scores = similarity(image, text)
    ours = retrieval_metrics(best_rank(scores, own), best_rank(scores.T, own))
    assert {name: ours[name] for name in theirs} == pytest.approx({name: float(theirs[name]) for name in theirs})


def test_median_rank_rounds_down():
    for ranks in ([0, 1, 4, 9], [0, 1, 5, 9], [3], [2, 2, 8]):
        expected = np.floor(np.median(ranks)) + 1
        assert rank_metrics(torch.tensor(ranks), "x")["x_median_rank"] == expected


def test_rsum_is_the_sum_of_recalls_in_percent():
    metrics = retrieval_metrics(torch.tensor([0, 3]), torch.tensor([0, 0, 7, 20]))
    assert metrics["rsum"] == pytest.approx(50 + 100 + 100 + 50 + 50 + 75)
    assert (metrics["num_samples"], metrics["num_captions"]) == (2, 4)


def test_a_single_query_gets_the_similarities_it_gets_among_many():
    query, candidate = unit(5, 513), unit(30, 513, seed=1)
    torch.testing.assert_close(similarity(query[:1], candidate), similarity(query, candidate)[:1])


@pytest.mark.parametrize("tf32", [False, True])
def test_an_evaluation_lets_compiled_models_be(tf32: bool):
    torch._dynamo.reset()
    try:
        if tf32:
            torch.backends.cuda.matmul.allow_tf32 = True
        double = torch.compile(lambda x: x + x, backend="eager")
        double(torch.ones(2))
        with full_float32():
            pass
        with torch.compiler.set_stance("fail_on_recompile"):
            assert double(torch.ones(2)).sum() == 4
    finally:
        torch.set_float32_matmul_precision("highest")
        torch._dynamo.reset()


def test_similarity_leaves_the_matmul_precision_as_it_was():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with full_float32():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def test_contrastive_loss_is_the_mean_of_both_cross_entropies():
    image, text = unit(6, 4, seed=1).double(), unit(6, 4, seed=2).double()
    logits = 5 * image @ text.T
    by_hand = [(2 * logits[i, i] - logits[i].exp().sum().log() - logits[:, i].exp().sum().log()) / -2 for i in range(6)]
    assert contrastive_loss(image, text, torch.tensor(5.0)).item() == pytest.approx(float(sum(by_hand)) / 6)


def test_mean_recall_is_over_the_classes_that_occur():
    label, rank = torch.tensor([0, 0, 0, 2, 2, 4]), torch.tensor([0, 3, 0, 1, 7, 0])
    found = accuracy(class_counts(rank, label, 6))
    assert (found.top1, found.top5) == pytest.approx((3 / 6, 5 / 6))
    assert found.mean_per_class_recall == pytest.approx((2 / 3 + 0 + 1) / 3)
    assert found.num_images == 6


def test_counts_of_parts_add_up():
    label, rank = torch.randint(4, (20,)), torch.randint(4, (20,))
    parts = [class_counts(rank[part], label[part], 4) for part in (slice(7), slice(7, None))]
    assert torch.equal(sum(parts), class_counts(rank, label, 4))


def test_average_precision_is_the_mean_precision_at_the_right_places():
    scores = torch.tensor([[0.9, 0.1], [0.8, 0.5], [0.7, 0.3], [0.1, 0.9]])
    truth = torch.tensor([[1, 0], [0, 0], [1, 0], [1, 0]]).bool()
    # Right places of the first class: 1st, 3rd and 4th; the second class has none.
    expected = torch.tensor([(1 / 1 + 2 / 3 + 3 / 4) / 3, 0], dtype=torch.float64)
    torch.testing.assert_close(average_precision(scores, truth), expected)
