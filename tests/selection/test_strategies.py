"""Every strategy through the same contract, then each against its own definition."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from dissect_clip.config.settings import Config
from dissect_clip.selection import STRATEGIES, Candidates, Needs, Strategy, StrategyOptions, build_strategy
from dissect_clip.selection.mixins import WeightsSamples
from dissect_clip.selection.registry import describe
from dissect_clip.selection.strategies.differential.strategy import differential

N = 8


def make_config(**changes: object) -> Config:
    return Config.of(select=True, warmup_select_rate=changes.pop("warmup_select_rate", 0.5), select_rate=0.5, **changes)  # type: ignore[arg-type]


def make_candidates(epoch: int = 20, columns: int = 1, seed: int = 0, **parts: object) -> Candidates:
    random = torch.Generator().manual_seed(seed)
    features = torch.nn.functional.normalize(torch.randn(2, N, 4, generator=random), dim=-1)
    defaults: dict[str, object] = {
        "epoch": epoch,
        "generator": torch.Generator().manual_seed(seed),
        "memory": torch.full((N, columns), torch.nan),
        "similarity": (features[0] * features[1]).sum(dim=1),
        "loss": torch.rand(N, generator=random),
        "image_features": features[0],
        "text_features": features[1],
        "logit_scale": torch.tensor(5.0),
        "reference_loss": torch.rand(N, generator=random),
        "reference_image_features": features[1],
        "reference_text_features": features[0].roll(1, 0),
        "reference_logit_scale": torch.tensor(7.0),
    }
    return Candidates(**(defaults | parts))  # type: ignore[arg-type]


def make_strategy(name: str, **changes: object) -> Strategy:
    return build_strategy(make_config(select_strategy=name, **changes))


@pytest.fixture(params=STRATEGIES)
def strategy(request: pytest.FixtureRequest):
    return make_strategy(request.param)


@pytest.mark.parametrize("epoch", [0, 20])
def test_rank_gives_one_number_a_sample(strategy, epoch):
    rank = strategy.rank(make_candidates(epoch, len(strategy.remembers)))
    assert rank.shape == (N,)
    assert rank.isfinite().all()


@pytest.mark.parametrize("epoch", [0, 20])
def test_remembers_as_many_columns_as_it_names(strategy, epoch):
    values = strategy.remember(make_candidates(epoch, len(strategy.remembers)))
    assert values is None or values.shape == (N, len(strategy.remembers))
    if not strategy.remembers:
        assert values is None


def test_looks_only_at_what_it_needs(strategy):
    everything = make_candidates(columns=len(strategy.remembers))
    needs = strategy.needs
    bare = dataclasses.replace(
        everything,
        similarity=everything.similarity if needs & (Needs.SIMILARITY | Needs.SCORE) else None,
        loss=everything.loss if Needs.LOSS in needs else None,
        image_features=everything.image_features if Needs.FEATURES in needs else None,
        text_features=everything.text_features if Needs.FEATURES in needs else None,
        reference_loss=everything.reference_loss if Needs.REFERENCE | Needs.LOSS in needs else None,
        reference_image_features=everything.reference_image_features
        if Needs.REFERENCE | Needs.FEATURES in needs
        else None,
        reference_text_features=everything.reference_text_features
        if Needs.REFERENCE | Needs.FEATURES in needs
        else None,
        reference_logit_scale=everything.reference_logit_scale if Needs.REFERENCE in needs else None,
    )
    first = strategy.rank(everything)
    everything.generator.manual_seed(0)  # both have the same
    assert torch.equal(first, strategy.rank(bare))


def test_is_pure(strategy):
    candidates = make_candidates(columns=len(strategy.remembers))
    before = {
        name: value.clone()
        for name in ("memory", "similarity", "loss", "image_features", "text_features", "reference_loss")
        if (value := getattr(candidates, name)) is not None
    }
    first = strategy.rank(candidates)
    candidates.generator.manual_seed(0)
    assert torch.equal(first, strategy.rank(candidates))
    strategy.remember(candidates)
    for name, value in before.items():
        assert torch.equal(getattr(candidates, name).nan_to_num(7), value.nan_to_num(7))


@pytest.mark.parametrize("epoch", [0, 9, 10, 11])
def test_rate_is_a_share(strategy, epoch):
    assert 0 < strategy.rate(epoch) <= 1


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_registry_agrees_with_the_class(name: str):
    entry, kind = STRATEGIES[name], STRATEGIES.class_of(name)
    found = describe(kind, entry.target)
    assert STRATEGIES.options_of(name) is kind.Options
    combines = found.combines and name != "random"  # which would add nothing
    assert (entry.scores, entry.combines, entry.reuses) == (found.scores, combines, found.reuses)


@pytest.mark.parametrize("name", STRATEGIES)
def test_its_weights_are_announced_by_the_mixin(name: str):
    kind = STRATEGIES.class_of(name)
    assert (kind.weights is not Strategy.weights) == issubclass(kind, WeightsSamples)


def test_the_base_has_six_members():
    public = {name for name in vars(Strategy) if not name.startswith("_")} - {"Options"}
    assert public == {"needs", "remembers", "rate", "rank", "remember", "weights"}


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_full_epochs_end_the_run_and_schedules_go_to_the_select_rate(strategy, schedule):
    config = make_config(
        select_strategy=strategy.run.select_strategy, epochs=20, select_full_last=0.1, select_rate_schedule=schedule,
        select_rate_start=0.9, scan_warmup=2, scan_period=3, warmup_point=3,
    )  # fmt: skip
    strategy = build_strategy(config)
    rates = [strategy.rate(epoch) for epoch in range(20)]
    assert rates[18:] == [1, 1]
    assert rates[17] == pytest.approx(0.5)
    assert max(rates[:18]) <= 1


def test_a_warm_up_keeps_its_own_rate_and_a_schedule_begins_after_it():
    changes = {"warmup_point": 3, "warmup_select_rate": 0.7, "select_rate_schedule": "linear", "epochs": 6}
    strategy = make_strategy("warmup_base_sampling", **changes)
    assert [strategy.rate(epoch) for epoch in range(6)] == [0.7, 0.7, 0.7, 1.0, 0.75, 0.5]


@pytest.mark.parametrize("name", STRATEGIES)
def test_has_a_line_for_help(name: str):
    assert 20 < len(STRATEGIES[name].summary) < 120


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("small_loss", {"loss": 100.0}),
        ("clipscore", {"similarity": -1.0}),
        ("warmup_base_sampling", {"similarity": 1.0}),  # memorised: it scores far above its history
        ("historical_base_sampling", {"similarity": 1.0}),
    ],
)
def test_drops_a_known_bad_sample(name, bad):
    strategy = make_strategy(name)
    candidates = make_candidates(memory=torch.full((N, 1), 30.0), similarity=torch.linspace(0.2, 0.4, N))
    ((part, value),) = bad.items()
    changed = getattr(candidates, part).clone()
    changed[3] = value
    rank = strategy.rank(dataclasses.replace(candidates, **{part: changed}))
    assert rank.argmin() == 3


def test_big_loss_is_small_loss_reversed():
    candidates = make_candidates()
    small, big = (make_strategy(name).rank(candidates) for name in ("small_loss", "big_loss"))
    assert torch.equal(small.argsort(), big.argsort(descending=True))


def test_clip_score_is_clamped_at_zero():
    rank = make_strategy("clipscore").rank(make_candidates(similarity=torch.tensor([0.5, -0.5, 0.0])))
    assert rank.tolist() == [50.0, 0.0, 0.0]


def test_differential_by_hand():
    history = torch.tensor([30.0, 10.0, torch.nan, 20.0])
    current = torch.tensor([20.0, 30.0, 99.0, 21.0])
    expected = [10.0, -20.0, (10 - 20 - 1) / 3, -1.0]
    assert differential(history, current).tolist() == pytest.approx(expected)


def test_without_any_history_all_are_tied():
    assert differential(torch.full((4,), torch.nan), torch.arange(4.0)).tolist() == [0.0] * 4


def test_warmup_scores_are_frozen_when_selection_starts():
    strategy = make_strategy("warmup_base_sampling", warmup_point=3)
    last, first = make_candidates(epoch=2), make_candidates(epoch=3)
    assert torch.equal(strategy.remember(last)[:, 0], (100 * last.similarity).clamp(min=0))
    assert strategy.remember(first) is None


def test_warmup_is_uniform_at_its_own_rate():
    strategy = make_strategy("warmup_base_sampling", warmup_point=3, warmup_select_rate=0.9)
    assert [strategy.rate(epoch) for epoch in (0, 2, 3)] == [0.9, 0.9, 0.5]
    assert strategy.rank(make_candidates(epoch=2)).unique().numel() == 1


def test_momentum_moves_the_history():
    strategy = make_strategy("historical_base_sampling", select_momentum=0.75)
    candidates = make_candidates(memory=torch.tensor([[40.0], [torch.nan]]), similarity=torch.tensor([0.2, 0.6]))
    assert strategy.remember(candidates)[:, 0].tolist() == pytest.approx([0.75 * 40 + 0.25 * 20, 60.0])


def strategy_in(page: str, name: str) -> type[Strategy]:
    """The strategy that a page of the documentation defines in a block of code."""
    text = (Path(__file__).resolve().parents[2] / page).read_text()
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if f"class {name}(" in block]
    names: dict[str, object] = {}
    exec(compile(code, page, "exec", dont_inherit=True), names)
    return names[name]  # type: ignore[return-value]


def test_the_strategy_in_the_readme_works():
    margin = strategy_in("README.md", "Margin")(StrategyOptions(), make_config().plan())
    candidates = make_candidates()
    rank = margin.rank(candidates)
    for place in range(N):
        others = [j for j in range(N) if j != place]
        hardest = max((candidates.image_features[place] @ candidates.text_features[j]).item() for j in others)
        assert rank[place].item() == pytest.approx(candidates.similarity[place].item() - hardest, abs=1e-6)


def test_the_strategy_in_the_guide_works():
    stale = strategy_in("docs/guides/write-a-strategy.md", "Stale")
    strategy = stale(stale.Options(stale_decay=0.75, stale_floor=3.0), make_config().plan())
    memory, loss = torch.tensor([[8.0], [torch.nan], [0.0]]), torch.tensor([4.0, 5.0, 2.0])
    candidates = make_candidates(memory=memory, loss=loss)
    assert strategy.remember(candidates)[:, 0].tolist() == [7.0, 5.0, 0.5]
    assert strategy.rank(candidates).tolist() == [7.0, 5.0, 3.0]
    assert describe(stale, "my_package.stale:Stale").summary == "largest moving average of the loss"
