"""Online sample selection in the Trainer of Hugging Face.

    python examples/huggingface_trainer.py

``compute_loss`` scores the batch, chooses, and computes the loss on the chosen rows alone.
"""

import tempfile
from typing import Any

import torch
from pairs import Pairs
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, Trainer, TrainerCallback, TrainingArguments, set_seed

import dissect_clip

TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


class EpochStart(TrainerCallback):
    """Tells the selection which epoch begins."""

    def __init__(self, selection: dissect_clip.Selection) -> None:
        self.selection = selection

    def on_epoch_begin(self, arguments: Any, state: Any, control: Any, **others: Any) -> None:
        self.selection.start_epoch(int(state.epoch))


class SelectiveTrainer(Trainer):
    """Trains on the best part of every batch."""

    def __init__(self, selection: dissect_clip.Selection, **arguments: Any) -> None:
        super().__init__(callbacks=[EpochStart(selection)], **arguments)
        self.selection, self.kept = selection, 0

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], *others: Any, **more: Any) -> Tensor:
        sample_id, pairs = inputs["sample_id"], {"pixel_values": inputs["image"], "input_ids": inputs["text"]}
        with torch.no_grad():
            scored = model(**pairs)
        index = self.selection.choose(sample_id, scored.image_embeds, scored.text_embeds).index
        self.kept += len(index)
        return model(**{name: part[index] for name, part in pairs.items()}, return_loss=True).loss


if __name__ == "__main__":
    set_seed(0)
    pairs, epochs = Pairs(), 2
    text = TOWER | {"vocab_size": 49408, "max_position_embeddings": 16, "eos_token_id": 49407}
    vision = TOWER | {"image_size": 32, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=32))
    chosen = dissect_clip.Selection("clipscore", rate=0.5, num_samples=len(pairs), epochs=epochs, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(folder, num_train_epochs=epochs, per_device_train_batch_size=64, seed=0,
                                     use_cpu=True, remove_unused_columns=False, report_to="none")  # fmt: skip
        trainer = SelectiveTrainer(chosen, model=model, args=settings, train_dataset=pairs)
        trainer.train()
    print(f"kept {trainer.kept} of {epochs * len(pairs)} pairs")
