"""The one exception that stands for a user's mistake or an outside failure."""


class UserError(Exception):
    """What went wrong, where, and what to do: one line, printed by the commands without traceback."""


class ConfigError(UserError):
    """A configuration key that is unknown, of the wrong type or impossible; names key and remedy."""


class Diverged(UserError):
    """Training ended because its steps were no longer finite."""
