"""Online sample selection in a plain training loop, with a model of open_clip.

    python examples/plain_pytorch.py

Each batch is scored without gradients, the best 30 % of it are trained on, and the state of the selection is a part
of the checkpoint.
"""

import open_clip
import torch
from pairs import Pairs, small_clip
from torch.utils.data import DataLoader

import dissect_clip

EPOCHS = 3


def main() -> None:
    """Train, and print what was kept."""
    torch.manual_seed(0)
    pairs, model, loss = Pairs(), small_clip(), open_clip.ClipLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    selection = dissect_clip.Selection(
        "warmup_base_sampling", rate=0.3, num_samples=len(pairs), epochs=EPOCHS, seed=0, warmup_point=1
    )
    for epoch in range(EPOCHS):
        selection.start_epoch(epoch)
        seen = kept = 0
        for batch in DataLoader(pairs, batch_size=64, shuffle=True, drop_last=True):
            image, text, sample_id = batch["image"], batch["text"], batch["sample_id"]

            # The scoring pass: forward only, on the whole batch.
            model.eval()
            with torch.no_grad():
                scored = model(image, text)
            choice = selection.choose(sample_id, scored["image_features"], scored["text_features"])

            # The training pass: only on the rows that were chosen.
            model.train()
            out = loss(**model(image[choice.index], text[choice.index]), output_dict=True)
            optimizer.zero_grad()
            out["contrastive_loss"].backward()
            optimizer.step()
            seen, kept = seen + len(sample_id), kept + len(choice.index)
        print(f"epoch {epoch}: kept {kept} of {seen} pairs, loss {out['contrastive_loss']:.3f}")
        torch.save({"model": model.state_dict(), "selection": selection.state_dict()}, "plain_pytorch.pt")

    # A resumed run continues with the same choices.
    state = torch.load("plain_pytorch.pt", weights_only=True)
    selection.load_state_dict(state["selection"])


if __name__ == "__main__":
    main()
