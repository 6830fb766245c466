"""The one error that is the user's to mend."""


class ConfigError(ValueError):
    """A setting cannot work. The message is one line: key, value and what would be right."""
