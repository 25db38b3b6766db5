"""Optimizer set-up and step."""

from pathlib import Path

import pytest
import torch
from toy import make_config, make_module

from dissect_clip.errors import SetupError
from dissect_clip.training.optimizer import build_optimizer, build_scaler, decays, optimizer_step, set_learning_rate


def test_weight_decay_leaves_vectors_norms_biases_and_scales_out(tmp_path: Path):
    module = make_module(tmp_path)
    kept = {name for name, parameter in module.named_parameters() if decays(name, parameter)}
    assert "visual.conv1.weight" in kept
    assert "token_embedding.weight" in kept
    assert not [name for name in kept if "ln_" in name or name.endswith("bias") or name == "logit_scale"]


def test_every_trainable_parameter_is_in_one_group(tmp_path: Path):
    module = make_module(tmp_path, lock_image=True)
    optimizer = build_optimizer(make_config(tmp_path, wd=0.3), module)
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    trainable = [p for p in module.parameters() if p.requires_grad]
    assert len(grouped) == len(trainable)
    assert {id(p) for p in grouped} == {id(p) for p in trainable}
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.3]


def test_timm_optimizers_by_name(tmp_path: Path):
    config = make_config(tmp_path, opt="timm/lamb", beta1=None, beta2=None, eps=None)
    assert type(build_optimizer(config, make_module(tmp_path))).__name__ == "Lamb"


def test_unknown_timm_optimizer_is_named(tmp_path: Path):
    with pytest.raises(SetupError, match="timm/nonsense"):
        build_optimizer(make_config(tmp_path, opt="timm/nonsense"), make_module(tmp_path))


def test_nothing_to_train_is_an_error(tmp_path: Path):
    with pytest.raises(SetupError, match="locked"):
        build_optimizer(make_config(tmp_path), make_module(tmp_path).requires_grad_(False))


def test_no_scaler_on_a_cpu(tmp_path: Path):
    assert build_scaler(make_config(tmp_path, precision="amp"), torch.device("cpu")) is None


def test_clipping_bounds_the_step():
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([30.0, 40.0])
    optimizer_step(torch.optim.SGD([weight], lr=1.0), None, [weight], clip_norm=1.0)
    assert weight.tolist() == pytest.approx([-0.6, -0.8], rel=1e-4)


def test_learning_rate_goes_to_every_group():
    optimizer = torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(1))]} for _ in range(2)], lr=1.0)
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


@pytest.mark.parametrize("opt", ["adamw", "timm/sgd"])
@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_a_gradient_that_is_not_finite_changes_no_weight(tmp_path: Path, opt: str, clip_norm: float | None):
    config = make_config(tmp_path, opt=opt, wd=0.1 if opt == "adamw" else 0.0, momentum=0.9)
    module = make_module(tmp_path)
    optimizer = build_optimizer(config, module)
    parameters = list(module.parameters())
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, float(opt == "adamw"))  # or momentum would go on
    assert optimizer_step(optimizer, None, parameters, clip_norm).item()
    before = [parameter.detach().clone() for parameter in parameters]
    parameters[3].grad[0] = torch.nan  # type: ignore[index]
    assert not optimizer_step(optimizer, None, parameters, clip_norm).item()
    assert all(torch.equal(old, new) for old, new in zip(before, parameters, strict=True))
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    assert optimizer_step(optimizer, None, parameters, clip_norm).item()
    assert not any(torch.equal(old, new) for old, new in zip(before, parameters, strict=True))
    assert all(parameter.isfinite().all() for parameter in parameters)


@pytest.mark.parametrize(
    ("dtype", "value", "finite"),
    [
        (torch.float32, 1e18, True),
        (torch.float32, 1e20, False),  # Adam's second moment would be infinite for ever
        (torch.bfloat16, 1e18, True),
        (torch.float16, 6e4, True),  # a norm in fp16 would be infinite
        (torch.float16, torch.inf, False),
    ],
)
def test_what_counts_as_finite(dtype: torch.dtype, value: float, finite: bool):
    weight = torch.nn.Parameter(torch.zeros(4, dtype=dtype))
    weight.grad = torch.full_like(weight, value)
    assert optimizer_step(torch.optim.SGD([weight], lr=1e-6), None, [weight], None).item() is finite
