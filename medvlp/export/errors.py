"""The error of an export that cannot be made."""

from shards.errors import MedvlpError


class ExportError(MedvlpError):
    """A run cannot be exported as asked, or the folder cannot be written; the message says what to do."""

    exit_code = 4
