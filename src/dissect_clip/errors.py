"""Errors whose message is meant for the person at the terminal; the command line prints them without a traceback."""


class SetupError(Exception):
    """Something is wrong with flags, data or files, found before training; the message says what to do."""


class TrainingError(Exception):
    """Training cannot go on; the message says what happened and what to look at."""
