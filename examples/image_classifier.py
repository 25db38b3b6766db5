"""Online sample selection for an image classifier: strategies that look at the loss alone work for any model.

    python examples/image_classifier.py

``small_loss`` needs the loss of every sample before the step, so there is a scoring pass. ``infobatch`` learns from
the losses of the training pass: nothing is computed twice, and its weights keep the gradient unbiased.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import dissect_clip

EPOCHS = 6


def train(strategy: str) -> None:
    """Train a classifier of digits with 80 % of every batch, and print what was kept."""
    torch.manual_seed(0)
    image, label = load_digits(return_X_y=True)
    image, label = torch.tensor(image).float() / 16, torch.tensor(label)
    data = TensorDataset(image, label, torch.arange(len(image)))  # the third part is the number of the sample
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    selection = dissect_clip.Selection(strategy, rate=0.8, num_samples=len(data), epochs=EPOCHS, seed=0)
    seen = kept = 0
    for epoch in range(EPOCHS):
        selection.start_epoch(epoch)
        for x, y, sample_id in DataLoader(data, batch_size=64, shuffle=True):
            if strategy == "small_loss":
                with torch.no_grad():
                    choice = selection.choose(sample_id, loss=cross_entropy(model(x), y, reduction="none"))
            else:
                choice = selection.choose(sample_id)
            index = choice.index
            loss = cross_entropy(model(x[index]), y[index], reduction="none")
            selection.learn(sample_id[index], loss)  # has no effect with small_loss
            optimizer.zero_grad()
            (loss if choice.weight is None else loss * choice.weight).mean().backward()
            optimizer.step()
            seen, kept = seen + len(sample_id), kept + len(index)
    with torch.no_grad():
        accuracy = (model(image).argmax(dim=1) == label).float().mean()
    print(f"{strategy}: kept {kept} of {seen} samples, accuracy {accuracy:.2f}")


if __name__ == "__main__":
    for name in ("small_loss", "infobatch"):
        train(name)
