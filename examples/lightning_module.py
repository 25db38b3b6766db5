"""Online sample selection in a Lightning module.

    python examples/lightning_module.py

The selection is used in ``training_step``, and its state goes into Lightning's checkpoints.
"""

from typing import Any

import lightning
import open_clip
import torch
from pairs import Pairs, small_clip
from torch import Tensor
from torch.utils.data import DataLoader

import dissect_clip


class SelectiveClip(lightning.LightningModule):
    """CLIP that trains on the best part of every batch."""

    def __init__(self, num_samples: int, epochs: int) -> None:
        super().__init__()
        self.clip, self.loss = small_clip(), open_clip.ClipLoss()
        self.settings = {"rate": 0.3, "num_samples": num_samples, "epochs": epochs, "seed": 0}
        self.kept = 0

    def setup(self, stage: str) -> None:
        # From here on Lightning's process group is there, if there are several processes.
        self.selection = dissect_clip.Selection("historical_base_sampling", **self.settings)

    def on_train_epoch_start(self) -> None:
        self.selection.start_epoch(self.current_epoch)

    def training_step(self, batch: dict[str, Tensor], number: int) -> Tensor:
        with torch.no_grad():
            scored = self.clip(batch["image"], batch["text"])
        index = self.selection.choose(batch["sample_id"], scored["image_features"], scored["text_features"]).index
        self.kept += len(index)
        return self.loss(**self.clip(batch["image"][index], batch["text"][index]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["selection"] = self.selection.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.selection.load_state_dict(checkpoint["selection"])


if __name__ == "__main__":
    lightning.seed_everything(0, verbose=False)
    pairs = Pairs()
    module = SelectiveClip(len(pairs), epochs=2)
    trainer = lightning.Trainer(max_epochs=2, accelerator="cpu", logger=False, enable_progress_bar=False)
    trainer.fit(module, DataLoader(pairs, batch_size=64, shuffle=True))
    print(f"kept {module.kept} of {2 * len(pairs)} pairs")
