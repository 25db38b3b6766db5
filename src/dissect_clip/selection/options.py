"""The settings of a selection that is built without a command line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dissect_clip.config.parser import completed
from dissect_clip.config.settings import GROUP_OF, Config, declared
from dissect_clip.config.validation import contradictions
from dissect_clip.selection.registry import STRATEGIES

_OF_THE_RUN = ("siglip",)
"""Settings that are none of the selection's, but that strategies depend on."""


def library_settings(
    strategy: str, rate: float, num_samples: int, epochs: int, seed: int, accumulate: int, options: Mapping[str, Any]
) -> Config:
    """Settings as the command line would have them; ``options`` by the names of their flags.

    Raises:
        ValueError: an option is unknown, out of range, or contradicts another one.
    """
    strategy = STRATEGIES.canonical_text(strategy)
    settings = {name: setting for name, setting in declared().items() if GROUP_OF[name] == "selection"}
    settings |= {name: declared()[name] for name in _OF_THE_RUN}
    for name, owners in STRATEGIES.flags(STRATEGIES.known(strategy)).items():
        settings[name] = next(iter(owners.values()))
    known = list(settings)
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"Selection has no option {unknown[0]!r}; it has {', '.join(known)}")
    values = {
        "select_strategy": strategy,
        "select_rate": rate,
        "train_num_samples": num_samples,
        "epochs": epochs,
        "seed": seed,
        "accum_freq": accumulate,
        **options,
    }
    for name, value in values.items():
        facts = (settings.get(name) or declared()[name])[0].metadata
        if facts["within"] is not None and value is not None and value not in facts["within"]:
            raise ValueError(f"Selection: {name} is {value!r}, and must be {facts['within']}")
        if facts["choices"] is not None and value is not None and value not in facts["choices"]:
            raise ValueError(f"Selection: {name} is {value!r}, and must be one of {', '.join(facts['choices'])}")
    # Samples come from the caller: for the checks below any kind of data does.
    config = Config.of(**values, select=True, dataset_type="synthetic")
    for line in contradictions(config, STRATEGIES):
        raise ValueError(f"Selection: {line}")
    return completed(config, STRATEGIES)
