"""The error of an encoder that cannot be built or used as configured."""

from shards.errors import MedvlpError


class EncoderError(MedvlpError, ValueError):
    """A backbone, its weights or its input do not fit the config; the message names the config key."""

    exit_code = 2
