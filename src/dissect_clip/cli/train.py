"""``dissect-clip train``: train a model, or evaluate a checkpoint if there is no training data. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dissect_clip.cli.exit_status import STATUSES, only_first_rank_prints
from dissect_clip.cli.main import COMMANDS
from dissect_clip.config.parser import Surroundings, parse_args
from dissect_clip.selection.registry import STRATEGIES

if TYPE_CHECKING:
    from dissect_clip.distributed.world import World


def main(argv: Sequence[str]) -> int:
    """Train, or evaluate a checkpoint if there is no training data; the exit status."""
    surroundings = Surroundings({name: command.summary for name, command in COMMANDS.items()}, STATUSES)
    with only_first_rank_prints():
        config = parse_args(argv, STRATEGIES, surroundings)

    from dissect_clip.cli.launch import launch  # torch takes seconds to load
    from dissect_clip.cli.training_run import run

    def work(world: World) -> int:
        run(config, world)
        return 0

    return launch(config, work, "--resume latest continues from the last checkpoint")
