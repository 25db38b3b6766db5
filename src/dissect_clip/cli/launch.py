"""What every command shares: from settings to a world of processes, and from how the work ends to an exit status."""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable

from dissect_clip.cli.exit_status import EXIT_INTERRUPT, EXIT_REQUEUE, EXIT_SETUP, EXIT_TRAINING, is_first_rank
from dissect_clip.config.settings import Config
from dissect_clip.distributed.world import World, init_world, is_loss_of_others, shutdown_world
from dissect_clip.errors import SetupError, Stopped, TrainingError, printable
from dissect_clip.run.console import close_logging

log = logging.getLogger(__name__)


def launch(config: Config, work: Callable[[World], int], afterwards: str) -> int:
    """Do ``work``, which gives an exit status, in the world that the settings describe; returns the status.

    Of several processes, one that cannot go on ends here and now, and the watch ends the others. ``afterwards`` tells
    the user how to go on after an end that was not the work's own.
    """
    first = is_first_rank()
    try:
        world = init_world(
            config.distributed.device,
            config.distributed.dist_backend,
            config.distributed.dist_url,
            not config.distributed.no_set_device_rank,
            config.distributed.rank_timeout,
        )
    except SetupError as error:
        prefix = "error: " if first else f"error on rank {os.environ['RANK']}: "
        print(f"{prefix}{error}", file=sys.stderr, flush=True)
        return EXIT_SETUP
    try:
        status = work(world)
    except Stopped as stopped:
        log.info("Stopped by %s; --resume latest goes on from here", stopped.signal_name)
        status = EXIT_INTERRUPT if stopped.signal_name == "SIGINT" else EXIT_REQUEUE
    except (Exception, KeyboardInterrupt) as error:
        status = _fail(error, world, afterwards)
    except BaseException:
        if world.size == 1:
            world.watchdog.close()  # else it would find the run stalled, and end the process
        raise
    finally:
        close_logging()
    shutdown_world()
    world.watchdog.close()
    return status


_STATUS: dict[type[BaseException], int] = {SetupError: EXIT_SETUP, KeyboardInterrupt: EXIT_INTERRUPT}


def _fail(error: BaseException, world: World, afterwards: str) -> int:
    """Say why the run ends; the exit status. Ends the process where there are several.

    Raises:
        BaseException: ``error``, in a single process, if it is none whose message is enough.
    """
    if world.size > 1:
        # torch's handler raises in the main thread for every loader worker that was killed: once is enough.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        # torchrun sends it as soon as a rank has died, and this one has still to learn and to say which.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    log.debug("ended by", exc_info=error)  # into the log file, with --debug
    if is_loss_of_others(error):
        world.watchdog.report_lost_peers(error)
    words = _explain(error, afterwards)
    if words is None:
        if world.size == 1:
            world.watchdog.close()
            raise error
        traceback.print_exception(error)
        words = printable(f"{type(error).__name__}: {error}")
    status = _STATUS.get(type(error), EXIT_TRAINING)
    world.watchdog.abort(words, status)
    return status


def _explain(error: BaseException, afterwards: str) -> str | None:
    """What to say of an error; None if its traceback has to be seen."""
    if isinstance(error, (SetupError, TrainingError)):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return f"interrupted; {afterwards}"
    if isinstance(error, RuntimeError) and "DataLoader worker" in str(error):
        return (
            f"a loader worker is gone ({str(error).strip()}). It was probably killed for memory (dmesg tells): give "
            f"fewer --workers, or more memory. {afterwards[0].upper()}{afterwards[1:]}"
        )
    return None
