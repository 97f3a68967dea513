"""Errors a user can do something about; the command line shows them as one line and an exit code."""

from __future__ import annotations


class MedvlpError(Exception):
    """Base of every error that says what was wrong, where, and what to do about it."""

    exit_code: int = 1


class UsageError(MedvlpError):
    """A value on the command line that cannot be."""

    exit_code = 2


class DataError(MedvlpError):
    """A dataset, shard, sample or source file cannot be used as it is."""

    exit_code = 3
