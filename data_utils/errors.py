"""Errors with a message for the user; data_utils/launch.py turns them into an exit status."""


class UsageError(Exception):
    """The command line asks for something impossible: exit status 2. The message says what to type instead."""


class DataError(Exception):
    """A file has unusable content: exit status 1. The message says what was found and what to type."""


class CheckpointError(DataError):
    """A checkpoint can't be read or written; the message names the file and the reason."""
