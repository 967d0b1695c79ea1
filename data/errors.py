"""The one exception of this package, in a file of its own so that every module can import it."""


class DataError(ValueError):
    """A user's mistake or a broken file. The message is one line: what was wrong, what to do."""
