"""Online sample selection under DistributedDataParallel, two processes on a CPU.

    torchrun --nproc_per_node 2 examples/ddp.py

The selection finds the default process group by itself: losses are against the pairs of all ranks, and all ranks keep
one table of scores. Every rank keeps the same number of rows, so the loss needs no special care.
"""

import open_clip
import torch
import torch.distributed as dist
from pairs import Pairs, small_clip
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

import dissect_clip

EPOCHS = 2


def main() -> None:
    """Train, and print what was kept."""
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    pairs, clip = Pairs(), small_clip()
    model = DistributedDataParallel(clip)
    loss = open_clip.ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    sampler = DistributedSampler(pairs, seed=0, drop_last=True)
    # After the process group, which it looks for when it is made.
    selection = dissect_clip.Selection("small_loss", rate=0.5, num_samples=len(pairs), epochs=EPOCHS, seed=0)
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        selection.start_epoch(epoch)
        for batch in DataLoader(pairs, batch_size=32, sampler=sampler, drop_last=True):
            image, text, sample_id = batch["image"], batch["text"], batch["sample_id"]
            with torch.no_grad():  # through the module itself: DDP has nothing to do in a scoring pass
                scored = clip(image, text)
            index = selection.choose(
                sample_id, scored["image_features"], scored["text_features"], scored["logit_scale"]
            ).index
            out = loss(**model(image[index], text[index]), output_dict=True)["contrastive_loss"]
            optimizer.zero_grad()
            out.backward()
            optimizer.step()
        print(f"epoch {epoch}, rank {rank}: kept {len(index)} of {len(sample_id)} pairs a batch, loss {out:.3f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
