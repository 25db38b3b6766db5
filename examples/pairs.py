"""Data of the examples: random pairs of an image and a caption that belong to ten topics, with a number each."""

import open_clip
import torch
from torch import Tensor
from torch.utils.data import Dataset


class Pairs(Dataset[dict[str, Tensor]]):
    """``size`` images and tokenized captions; ``sample_id`` never changes, whatever the order they come in."""

    def __init__(self, size: int = 256, image_size: int = 32) -> None:
        random = torch.Generator().manual_seed(0)
        topic = torch.randint(10, (size,), generator=random)
        colour = torch.randn(10, 3, 1, 1, generator=random)
        self.image = colour[topic] + 0.3 * torch.randn(size, 3, image_size, image_size, generator=random)
        self.text = open_clip.SimpleTokenizer(context_length=16)([f"a picture of topic {t}" for t in topic.tolist()])

    def __len__(self) -> int:
        return len(self.image)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"image": self.image[index], "text": self.text[index], "sample_id": torch.tensor(index)}


def small_clip() -> open_clip.CLIP:
    """A CLIP model that trains on a CPU in seconds."""
    torch.manual_seed(0)
    vision = {"layers": 2, "width": 64, "head_width": 32, "patch_size": 8, "image_size": 32}
    text = {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}
    return open_clip.CLIP(embed_dim=32, vision_cfg=vision, text_cfg=text, output_dict=True)
