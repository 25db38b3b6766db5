import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from toy_evaluation import Images, RetrievalToy, run_evaluation, toy_clip, toy_coca, toy_images

from dissect_clip.distributed.world import World
from dissect_clip.errors import TrainingError
from dissect_clip.evaluation.retrieval import rank_all

UNEVEN = (1, 5, 2, 3, 5, 1, 4, 5, 2, 1, 3)


def features(model: torch.nn.Module, images: Images) -> tuple[torch.Tensor, torch.Tensor]:
    model.eval()
    with torch.no_grad():
        return (
            model.encode_image(images.image, normalize=True),
            model.encode_text(torch.cat(images.texts), normalize=True),
        )


def expected_metrics(model: torch.nn.Module, images: Images) -> dict[str, float]:
    """All metrics from the whole M x T matrix, one image and one caption at a time."""
    image, text = features(model, images)
    scores = image @ text.T
    owner = [i for i, texts in enumerate(images.texts) for _ in texts]
    by_image = scores.argsort(dim=1, descending=True, stable=True).tolist()
    by_text = scores.T.argsort(dim=1, descending=True, stable=True).tolist()
    ranks = {
        "image_to_text": [min(row.index(t) for t, i in enumerate(owner) if i == m) for m, row in enumerate(by_image)],
        "text_to_image": [row.index(owner[t]) for t, row in enumerate(by_text)],
    }
    metrics = {}
    for name, rank in ranks.items():
        for k in (1, 5, 10):
            metrics[f"{name}_R@{k}"] = sum(r < k for r in rank) / len(rank)
        metrics[f"{name}_mean_rank"] = sum(rank) / len(rank) + 1
    return metrics


def expected_loss(model: torch.nn.Module, images: Images, batch_size: int) -> float:
    image, _ = features(model, images)
    first = torch.stack([text[0] for text in images.texts])
    text = model.encode_text(first, normalize=True)
    total = 0.0
    for start in range(0, len(image), batch_size):
        rows = slice(start, start + batch_size)
        logits = model.logit_scale.exp() * image[rows] @ text[rows].T
        target = torch.arange(len(logits))
        total += len(logits) * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)).item() / 2
    return total / len(image)


def test_uneven_numbers_of_captions():
    model, images = toy_clip(), toy_images(UNEVEN)
    expected = expected_metrics(model, images)
    metrics = run_evaluation(model, images.whole())
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    assert (metrics["num_samples"], metrics["num_captions"]) == (len(UNEVEN), sum(UNEVEN))


def test_clip_val_loss_is_over_batches_of_first_captions():
    model, images = toy_clip(), toy_images(UNEVEN)
    for batch_size in (4, 5, 100):
        metrics = run_evaluation(model, images.whole(), batch_size=batch_size)
        assert metrics["clip_val_loss"] == pytest.approx(expected_loss(model, images, batch_size), abs=1e-5)


def test_results_do_not_depend_on_the_order_of_loading():
    model, images = toy_clip(), toy_images(UNEVEN)
    shuffled = torch.randperm(len(UNEVEN), generator=torch.Generator().manual_seed(0)).tolist()
    metrics = run_evaluation(model, RetrievalToy(images.loader(shuffled, batch_size=2)))
    assert metrics == pytest.approx(run_evaluation(model, images.whole()), abs=1e-5)


@pytest.mark.parametrize("chunk", [1, 3, 40, 1000])
def test_chunk_size_does_not_matter(chunk):
    generator = torch.Generator().manual_seed(5)
    query, candidate = torch.randn(40, 6, generator=generator), torch.randn(25, 6, generator=generator)
    query_group, candidate_group = torch.arange(40) % 25, torch.arange(25)
    ranks = rank_all(query, candidate, query_group, candidate_group, World(), chunk)
    order = (query @ candidate.T).argsort(dim=1, descending=True, stable=True)
    assert ranks.tolist() == [row.index(i % 25) for i, row in enumerate(order.tolist())]


def test_no_matrix_of_all_queries_and_candidates_is_built():
    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else (result,):
                self.size = max(self.size, tensor.numel() if isinstance(tensor, torch.Tensor) else 0)
            return result

    groups = torch.arange(300)
    with Largest() as largest:
        rank_all(torch.randn(300, 4), torch.randn(300, 4), groups, groups, World(), chunk=10)
    assert largest.size == 10 * 300


def test_equal_features_are_at_chance():
    model, images = toy_clip(), toy_images([1] * 20)
    with torch.no_grad():
        model.visual.proj.zero_()
        model.text_projection.zero_()
    metrics = run_evaluation(model, images.whole())
    assert metrics["image_to_text_R@1"] == metrics["text_to_image_R@1"] == 1 / 20


class OpenClipLoader(list):
    num_samples = 0


def openclip_metrics(model: torch.nn.Module, images: Images, batch_size: int) -> dict[str, float]:
    """What OpenCLIP's own trainer reports."""
    from argparse import Namespace

    from open_clip_train.data import DataInfo
    from open_clip_train.train import evaluate

    batches = [(batch.image, batch.text) for batch in images.whole(batch_size).loader]
    args = Namespace(
        rank=0, device="cpu", precision="fp32", val_frequency=1, zeroshot_frequency=0, epochs=1, distributed=False
    )
    args.save_logs = args.wandb = False
    metrics = evaluate(model, {"val": DataInfo(OpenClipLoader(batches))}, 1, args)
    return {name: float(value) for name, value in metrics.items() if name != "epoch"}


def test_with_one_caption_an_image_openclip_reports_the_same():
    model, images = toy_clip(), toy_images([1] * 30)
    theirs = openclip_metrics(model, images, batch_size=7)
    ours = run_evaluation(model, images.whole(batch_size=5), batch_size=7)
    assert {name: ours[name] for name in theirs} == pytest.approx(theirs, abs=1e-5)


def test_coca_reports_the_captioning_loss_that_openclip_reports():
    model, images = toy_coca(), toy_images([1] * 6)
    theirs = openclip_metrics(model, images, batch_size=6)  # it adds up every hundredth batch only: give it one
    ours = run_evaluation(model, images.whole(batch_size=4), batch_size=6)
    assert "val_generative_loss" in theirs
    assert {name: ours[name] for name in theirs} == pytest.approx(theirs, abs=1e-5)


def test_captioning_loss_reads_the_first_captions():
    model = toy_coca()
    one, several = toy_images([1] * 6), toy_images([1] * 6)
    several.texts = [torch.cat([text, text.flip(0) * 0 + 5, text]) for text in several.texts]
    expected = run_evaluation(model, one.whole())["val_generative_loss"]
    assert run_evaluation(model, several.whole())["val_generative_loss"] == pytest.approx(expected)


def test_features_that_are_not_finite_stop_the_run():
    model, images = toy_clip(), toy_images([2] * 5)
    with torch.no_grad():
        model.text_projection[0, 0] = torch.nan
    with pytest.raises(TrainingError, match=r"toy: features of 0 of 5 images and 10 of 10 captions are NaN"):
        run_evaluation(model, images.whole())


def test_an_empty_set_stops_the_run():
    with pytest.raises(TrainingError, match="not one image"):
        run_evaluation(toy_clip(), RetrievalToy([]))
