"""Batches arrive as Batch.to makes them, whichever way they go."""

import pytest
import torch

from dissect_clip.data.batch import Batch
from dissect_clip.data.transfer import Transfer


def make_batch() -> Batch:
    random = torch.Generator().manual_seed(0)
    image = torch.randint(256, (4, 3, 8, 8), generator=random, dtype=torch.uint8)
    normalization = torch.tensor([[0.5, 0.4, 0.3], [0.2, 0.3, 0.1]])
    return Batch(image, torch.arange(8).reshape(4, 2), torch.arange(4), normalization=normalization, num_read=9)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_on_the_cpu_it_is_the_batch_itself(dtype):
    moved, expected = Transfer(torch.device("cpu"), dtype)(make_batch()), make_batch().to(torch.device("cpu"), dtype)
    assert torch.equal(moved.image, expected.image)
    assert moved.image.dtype == (dtype or torch.float32)
    assert moved.num_candidates == 9


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_it_is_the_same_beside_other_work_and_without_a_sync():
    device = torch.device("cuda")
    transfer = Transfer(device)
    expected = make_batch().to(device).image.cpu()
    torch.cuda.set_sync_debug_mode("error")
    try:
        images = []
        for _ in range(20):
            torch.cuda._sleep(1_000_000)
            images.append(transfer(make_batch().pin_memory()).image * 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(image.cpu(), expected) for image in images)
