"""Optimizer and gradient scaler, as OpenCLIP sets them up."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dissect_clip.config.settings import Config
from dissect_clip.errors import SetupError

_FUSED_DEVICES = ("cpu", "cuda")  # one kernel for the whole update


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: not to vectors and scalars, norms, biases and the logit scale."""
    return parameter.ndim >= 2 and not any(part in name for part in ("bn", "ln", "bias", "logit_scale"))


def build_optimizer(config: Config, module: nn.Module) -> Optimizer:
    """AdamW with two groups (without and with weight decay), or a timm optimizer.

    Raises:
        SetupError: if nothing is left to train, or timm does not know the optimizer.
    """
    named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    if not named:
        raise SetupError("every parameter is locked: unlock some layers, or evaluate without --train-data")
    if config.training.opt.startswith("timm/"):
        return _timm_optimizer(config, module)
    assert config.training.lr is not None
    assert config.training.beta1 is not None
    assert config.training.beta2 is not None
    assert config.training.eps is not None
    return torch.optim.AdamW(
        [
            {"params": [p for name, p in named if not decays(name, p)], "weight_decay": 0.0},
            {"params": [p for name, p in named if decays(name, p)], "weight_decay": config.training.wd},
        ],
        lr=config.training.lr,
        betas=(config.training.beta1, config.training.beta2),
        eps=config.training.eps,
        fused=named[0][1].device.type in _FUSED_DEVICES,
    )


def _timm_optimizer(config: Config, module: nn.Module) -> Optimizer:
    import timm.optim  # slow to import, and rarely needed

    options: dict[str, Any] = {
        "eps": config.training.eps,
        "momentum": config.training.momentum,
        "lr": config.training.lr,
    }
    if config.training.beta1 is not None:
        options["betas"] = (config.training.beta1, config.training.beta2)
    given = {name: value for name, value in options.items() if value is not None}
    try:
        optimizer: Optimizer = timm.optim.create_optimizer_v2(
            module, config.training.opt.removeprefix("timm/"), weight_decay=config.training.wd, **given
        )
    except (ValueError, AssertionError, TypeError) as error:
        raise SetupError(f"--opt {config.training.opt}: {error}") from error
    return optimizer


def build_scaler(config: Config, device: torch.device) -> torch.amp.GradScaler | None:
    """A gradient scaler for fp16 autocast on a GPU; None elsewhere."""
    if config.training.precision == "amp" and device.type == "cuda":
        return torch.amp.GradScaler(device=device.type)
    return None


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """One learning rate for all groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def optimizer_step(
    optimizer: Optimizer,
    scaler: torch.amp.GradScaler | None,
    parameters: Iterable[nn.Parameter],
    clip_norm: float | None,
) -> Tensor:
    """Clip if asked, and step; through the scaler where there is one. No device sync of its own.

    Where the gradient's norm is not finite the weights stay as they are; Adam squares the gradient, and has no use for
    one whose square overflows. The fused AdamW and the scaler leave the step out. Other optimizers take it with a
    gradient of 0: momentum and weight decay go on. The gradient is the same on all ranks, and so is what is done.

    Returns a scalar bool on the device: whether the gradient was finite. Gradients of a scaler that looks for its
    scale are told from broken ones by their loss, so they count as finite here.
    """
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    if scaler is not None:
        if clip_norm is not None:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(parameters, clip_norm)
        scaler.step(optimizer)
        scaler.update()
        return torch.ones((), dtype=torch.bool, device=parameters[0].device)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    finite = norm.isfinite()
    if any(gradient.dtype is torch.float16 for gradient in gradients):  # its norm overflows where it does not
        finite = nn.utils.get_total_norm(gradients, torch.inf).isfinite()
    if clip_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
    if optimizer.defaults.get("fused"):
        # What a scaler tells the fused kernel, which then updates nothing, without a word to the host.
        optimizer.grad_scale, optimizer.found_inf = None, (~finite).float()  # type: ignore[attr-defined]
    else:
        for gradient in gradients:
            gradient.copy_(gradient.where(finite, 0))
    optimizer.step()
    return finite
