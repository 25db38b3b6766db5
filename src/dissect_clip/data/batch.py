"""The tensors that travel from the loaders to the step.

Shapes: N pairs of this rank, M images, T captions, C classes, L tokens, W bytes of the longest key, P numbers and B
bytes of a loader worker's report.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor


def _move(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    return tensor.to(device=device, dtype=dtype, non_blocking=True)


def _normalise(levels: Tensor, normalization: Tensor) -> Tensor:
    """[N, 3, H, W] uint8 as float32, in the arithmetic of torchvision's ToTensor and Normalize, and so to the bit."""
    image = levels.to(torch.float32, memory_format=torch.contiguous_format)
    mean, std = normalization[:, :, None, None]
    # A GPU divides by a tensor; by a number it would multiply with the rounded inverse.
    return image.div_(image.new_full((), 255.0)).sub_(mean).div_(std)


@dataclass(frozen=True, slots=True)
class Batch:
    """Image-caption pairs to train on.

    ``sample_id`` is the pair's number in the dataset, the same in every epoch and on every rank. It is -1
    without numbering, which only selection and record need.
    """

    image: Tensor  # [N, 3, H, W] float, or uint8 with ``normalization``
    text: Tensor  # [N, L] int64
    sample_id: Tensor  # [N] int64, 0 <= id < num_samples
    key: Tensor | None = None  # [N, W] uint8, the samples' names in UTF-8, padded with 0; only where asked for
    progress: Tensor | None = None  # [P] int64 on the CPU, where its loader worker stands after it; for checkpoints
    skips: Tensor | None = None  # [B] uint8 on the CPU, packed rows of what its worker skipped since its last batch
    normalization: Tensor | None = None  # [2, 3] float32, what to subtract from levels of 0 to 1, and divide them by
    num_read: int | None = None  # how many samples the loader chose these from; None where it took all
    undecoded_ids: Tensor | None = None  # [P] int64 on the CPU, the ids of those that it did not choose

    def __len__(self) -> int:
        return len(self.sample_id)

    @property
    def num_candidates(self) -> int:
        """Samples that the batch was made of, with those that the loader left out after a look at their scores."""
        return len(self) if self.num_read is None else self.num_read

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Batch:
        """The batch on a device, without waiting for the copy; ``dtype`` is the image's. Keys stay where they are.

        Images that came as bytes are floats afterwards, normalised. The worker's report stays behind.
        """
        image = _move(self.image, device)
        if self.normalization is not None:
            image = _normalise(image, _move(self.normalization, device))
        return Batch(
            _move(image, device, dtype),
            _move(self.text, device),
            _move(self.sample_id, device),
            self.key,
            num_read=self.num_read,
        )

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory, from which a GPU copies without a wait; torch's loader calls it."""
        return dataclasses.replace(
            self,
            image=self.image.pin_memory(),
            text=self.text.pin_memory(),
            sample_id=self.sample_id.pin_memory(),
            normalization=None if self.normalization is None else self.normalization.pin_memory(),
        )

    def take(self, index: Tensor) -> Batch:
        """The pairs at ``index`` [K] int64, in that order, alone."""
        return Batch(self.image[index], self.text[index], self.sample_id[index], normalization=self.normalization)


@dataclass(frozen=True, slots=True)
class RetrievalBatch:
    """Images of a validation set with one or more captions each."""

    image: Tensor  # [M, 3, H, W] float
    text: Tensor  # [T, L] int64, T >= M; captions of one image stand together, in the order of the images
    captions: Tensor  # [M] int64, how many captions each image has, at least 1; sums to T
    order: Tensor  # [M] int64, the images' positions in the dataset; unique, rising within a shard

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> RetrievalBatch:
        """The batch on a device, without waiting for the copy; ``dtype`` is the image's."""
        return RetrievalBatch(_move(self.image, device, dtype), _move(self.text, device), self.captions, self.order)

    def pin_memory(self) -> RetrievalBatch:
        """See :meth:`Batch.pin_memory`."""
        return RetrievalBatch(self.image.pin_memory(), self.text.pin_memory(), self.captions, self.order)


@dataclass(frozen=True, slots=True)
class LabelledBatch:
    """Images of a classification set."""

    image: Tensor  # [M, 3, H, W] float
    label: Tensor  # [M] int64, a place in the set's class names; of a multi-label set [M, C] int64, 0 or 1
    order: Tensor  # [M] int64, the images' positions in the dataset; unique

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> LabelledBatch:
        """The batch on a device, without waiting for the copy; ``dtype`` is the image's."""
        return LabelledBatch(_move(self.image, device, dtype), _move(self.label, device), self.order)

    def pin_memory(self) -> LabelledBatch:
        """See :meth:`Batch.pin_memory`."""
        return LabelledBatch(self.image.pin_memory(), self.label.pin_memory(), self.order)
