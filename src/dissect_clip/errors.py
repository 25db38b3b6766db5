"""Errors whose message is meant for the person at the terminal; the command line prints them without a traceback."""


class SetupError(Exception):
    """Something is wrong with flags, data or files, found before training; the message says what to do."""


class TrainingError(Exception):
    """Training cannot go on; the message says what happened and what to look at."""


class Stopped(Exception):  # noqa: N818 - nothing went wrong
    """A signal asked for the end of the run, which is saved; ``signal_name`` as in ``signal.SIGTERM.name``."""

    def __init__(self, signal_name: str) -> None:
        super().__init__(f"stopped by {signal_name}")
        self.signal_name = signal_name
