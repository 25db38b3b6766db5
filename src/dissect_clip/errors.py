"""Errors whose message is meant for the person at the terminal; the command line prints them without a traceback."""


def printable(text: str) -> str:
    """A text with all that a terminal might obey, or a file could not hold, as an escape: ``\\x1b``, ``\\u202e``.

    Tabs and line breaks stay.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\t\n" else c.encode("unicode_escape").decode() for c in text)


class _ForPeople(Exception):  # noqa: N818 - what the errors below have in common
    """Its message may quote names found in the data, so it is :func:`printable`."""

    def __str__(self) -> str:
        return printable(super().__str__())


class SetupError(_ForPeople):
    """Something is wrong with flags, data or files, found before training; the message says what to do."""


class TrainingError(_ForPeople):
    """Training cannot go on; the message says what happened and what to look at."""


class Stopped(Exception):  # noqa: N818 - nothing went wrong
    """A signal asked for the end of the run, which is saved; ``signal_name`` as in ``signal.SIGTERM.name``."""

    def __init__(self, signal_name: str) -> None:
        super().__init__(f"stopped by {signal_name}")
        self.signal_name = signal_name
