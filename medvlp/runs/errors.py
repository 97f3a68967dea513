"""Errors of a run's files. All ranks raise them alike, so that showing one is enough."""

from shards.errors import MedvlpError


class AgreedError(MedvlpError):
    """Raised on all ranks together, after they told each other; the command line shows rank 0's only.

    Args:
        message: for the user.
        exit_code: of the error that one rank met; default: the class's.
    """

    def __init__(self, message: str, exit_code: int | None = None):
        super().__init__(message)
        if exit_code is not None:
            self.exit_code = exit_code


class CheckpointError(AgreedError):
    """A checkpoint cannot be written, read, or used by this run; the message says which and what to do."""

    exit_code = 4


class UnreadableError(CheckpointError):
    """A file of a checkpoint cannot be read now, which says nothing about what it holds."""


class RunFolderError(AgreedError):
    """The run folder cannot be made or used."""

    exit_code = 4
