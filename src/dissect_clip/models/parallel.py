"""A model on many ranks: DDP, synchronised BatchNorm, compilation, and buffers that are equal on all ranks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dissect_clip.config.settings import Config
from dissect_clip.distributed.world import World
from dissect_clip.errors import SetupError
from dissect_clip.models.openclip_compat import (
    DDP_WITHOUT_BUFFER_COPIES,
    disable_ddp_graph_splitting,
    silence_compiler_logs,
)


def wrap_model(module: nn.Module, config: Config, world: World) -> tuple[nn.Module, nn.Module]:
    """(the module itself, what to call in training): memory format, synchronised BatchNorm, DDP, compilation as asked.

    The first shares its weights with the second, and its state dict has no prefixes.

    Raises:
        SetupError: ``--use-bn-sync`` on several CPU ranks.
    """
    if config.training.channels_last:
        module = module.to(memory_format=torch.channels_last)  # convolutions follow it
    if world.size > 1 and config.training.use_bn_sync:
        if world.device.type == "cpu":
            raise SetupError("--use-bn-sync needs GPUs: torch has no synchronised BatchNorm for the CPU")
        module = nn.SyncBatchNorm.convert_sync_batchnorm(module)  # type: ignore[no-untyped-call]
    model: nn.Module = module
    if world.size > 1:
        model = DistributedDataParallel(
            module,
            device_ids=None if world.device.type == "cpu" else [world.device],
            **DDP_WITHOUT_BUFFER_COPIES,  # RunningBuffers does it after each step
            gradient_as_bucket_view=True,  # one copy of the gradients less, in time and in memory
            static_graph=config.distributed.ddp_static_graph,
        )
    if config.training.torchcompile:
        if config.model.grad_checkpointing and world.size > 1:
            disable_ddp_graph_splitting()
        silence_compiler_logs()
        model = torch.compile(model)  # type: ignore[assignment]
    return module, model


class RunningBuffers:
    """The buffers that training changes, BatchNorm's statistics: equal on all ranks between steps, and always finite.

    DDP copies rank 0's before each forward pass. Between steps the ranks would then score and evaluate with different
    ones, and a resumed run, in which all ranks load rank 0's, would not continue as if it had never stopped.
    """

    def __init__(self, module: nn.Module, world: World) -> None:
        saved = module.state_dict()
        self._buffers = [
            buffer for name, buffer in module.named_buffers() if buffer.is_floating_point() and name in saved
        ]
        self._world = world
        self.snapshot()

    def _flat(self) -> Tensor:
        return torch.cat([buffer.reshape(-1) for buffer in self._buffers])

    def snapshot(self) -> None:
        """Take the present values as the last good ones, as after a checkpoint was loaded."""
        if self._buffers:
            self._last = self._flat()

    @torch.no_grad()
    def synchronise(self, good: Tensor) -> None:
        """Set rank 0's values on all ranks after a step; the last good ones if they, or the step, are not finite.

        Args:
            good: scalar bool on the device, whether the step was finite; that of rank 0 counts.

        Collective if the module has such buffers: one broadcast. No device sync.
        """
        if not self._buffers:
            return
        flat = self._flat()
        sent = torch.cat([flat, good.to(flat.dtype)[None]])
        self._world.copy_from_main(sent)
        flat = sent[:-1]
        self._last = flat.where(flat.isfinite().all() & (sent[-1] > 0), self._last)
        parts = self._last.split([buffer.numel() for buffer in self._buffers])  # type: ignore[no-untyped-call]
        for buffer, part in zip(self._buffers, parts, strict=True):
            buffer.copy_(part.view_as(buffer))
