"""Errors that are a user's to mend: the command line prints them as one message, without a traceback."""


class UserError(ValueError):
    """Something the user gave is wrong; the message names the key, the value and the fix."""


class ConfigError(UserError):
    """A key, a value, a recipe or a size that does not exist or does not fit."""
