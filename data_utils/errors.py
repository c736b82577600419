"""The errors whose message a person can act on; data_utils/launch.py turns them into an exit status."""


class UsageError(Exception):
    """What was typed can't be done: exit status 2. The message says what was found and what to type."""


class DataError(Exception):
    """What was read can't be used: exit status 1. The message says what was found and what to type."""


class CheckpointError(DataError):
    """A checkpoint that can't be read or written; the message names the file and the reason."""
