"""Tiny open_clip models and evaluation sets, of the shapes that the loaders give."""

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import open_clip
import torch
from torch import Tensor, nn

from dissect_clip.data.batch import LabelledBatch, RetrievalBatch
from dissect_clip.distributed.world import World
from dissect_clip.evaluation import evaluate

CONTEXT = 8
END = 49407  # the largest token: the text tower reads its features there
TEXT = {"context_length": CONTEXT, "vocab_size": END + 1, "width": 32, "heads": 2, "layers": 1}
VISION = {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 16}
CLASSNAMES = ["ant", "bee", "cow", "dog", "elk", "fox", "gnu", "hen", "ibis", "jay", "kea", "lynx", "mole"]
TEMPLATES = [lambda name: f"a {name}.", lambda name: f"the {name}!"]


@dataclass
class RetrievalToy:
    loader: Iterable[RetrievalBatch]
    name: str = "toy"


@dataclass
class ClassificationToy:
    loader: Iterable[LabelledBatch]
    name: str = "toy"
    classnames: Sequence[str] = tuple(CLASSNAMES)
    templates: Sequence[Any] = tuple(TEMPLATES)


@dataclass
class Images:
    """A retrieval set in one piece: images [M, 3, 16, 16], and the captions of each."""

    image: Tensor
    texts: list[Tensor]  # M times [its captions, L]

    def loader(self, places: Sequence[int], batch_size: int = 3) -> list[RetrievalBatch]:
        """Batches of the images at these places of the set."""
        return [self._batch(torch.tensor(places[i : i + batch_size])) for i in range(0, len(places), batch_size)]

    def _batch(self, places: Tensor) -> RetrievalBatch:
        texts = [self.texts[place] for place in places.tolist()]
        captions = torch.tensor([len(text) for text in texts])
        return RetrievalBatch(self.image[places], torch.cat(texts), captions, places)

    def whole(self, batch_size: int = 3) -> RetrievalToy:
        return RetrievalToy(self.loader(range(len(self.image)), batch_size))


def toy_images(captions: Sequence[int], size: int = 16) -> Images:
    generator = torch.Generator().manual_seed(3)
    image = torch.randn(len(captions), 3, size, size, generator=generator)
    texts = [torch.randint(1, END, (count, CONTEXT), generator=generator) for count in captions]
    for text in texts:
        text[:, -1] = END
    return Images(image, texts)


def toy_clip(**vision: Any) -> open_clip.CLIP:
    """A CLIP with random weights whose features differ enough to be ranked; in training mode."""
    torch.manual_seed(1)
    model = open_clip.CLIP(16, VISION | vision, TEXT, output_dict=True)
    nn.init.normal_(model.token_embedding.weight)
    return model.train()


def toy_coca() -> open_clip.CoCa:
    torch.manual_seed(1)
    decoder = TEXT | {"dim_head": 16, "n_queries": 4, "attn_pooler_heads": 2}
    text = TEXT | {"embed_cls": True, "output_tokens": True}
    vision = VISION | {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
    model = open_clip.CoCa(32, decoder, text, vision)
    nn.init.normal_(model.text_decoder.text_projection, std=0.2)  # open_clip leaves it uninitialised
    return model.train()


def toy_tokenizer(texts: list[str]) -> Tensor:
    rows = [[ord(character) * 31 + place for place, character in enumerate(text[: CONTEXT - 1])] for text in texts]
    return torch.tensor([row + [END] * (CONTEXT - len(row)) for row in rows])


def toy_labelled(num_images: int) -> LabelledBatch:
    generator = torch.Generator().manual_seed(4)
    label = torch.randint(len(CLASSNAMES), (num_images,), generator=generator)
    return LabelledBatch(torch.randn(num_images, 3, 16, 16, generator=generator), label, torch.arange(num_images))


def run_evaluation(
    model: nn.Module,
    retrieval: RetrievalToy | None = None,
    classification: Sequence[ClassificationToy] = (),
    world: World | None = None,
    **settings: Any,
) -> dict[str, float]:
    """``evaluate`` with the settings of a float32 run."""
    defaults: dict[str, Any] = {"autocast": nullcontext, "input_dtype": None, "tokenizer": toy_tokenizer}
    return evaluate(model, retrieval, classification, world=world or World(), **{"batch_size": 4} | defaults | settings)
