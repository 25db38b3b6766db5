"""A strategy is built by name from its options and the facts about the run."""

from __future__ import annotations

from dissect_clip.config.settings import Config
from dissect_clip.errors import SetupError
from dissect_clip.selection.registry import STRATEGIES
from dissect_clip.selection.strategies.combination import Combination
from dissect_clip.selection.strategy import Strategy


def build_strategy(config: Config) -> Strategy:
    """The strategy that ``--select-strategy`` names, or several as one.

    Raises:
        SetupError: if a name is unknown, or a strategy cannot be combined with others.
        TypeError: if the settings hold an option that no known strategy has.
    """
    text, values, run = config.selection.select_strategy, config.selection.options, config.plan()
    try:
        members = STRATEGIES.members(text)
        unknown = sorted(values.keys() - STRATEGIES.flags(STRATEGIES.known(text)).keys())
    except ValueError as error:
        raise SetupError(f"--select-strategy {text}: {error}") from error
    if unknown:
        raise TypeError(f"no such setting: {', '.join(unknown)}")
    built = {
        name: (STRATEGIES.class_of(name)(STRATEGIES.options(name, values).completed(run), run), weight)
        for name, weight in members.items()
    }
    if len(built) > 1:
        return Combination(run, built)
    ((strategy, _),) = built.values()
    assert isinstance(strategy, Strategy)
    return strategy
