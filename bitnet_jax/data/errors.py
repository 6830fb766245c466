"""The one exception of this package."""


class DataError(ValueError):
    """A user's mistake about data. The message is one line: the thing, its value, what is right."""


def one_line(error: BaseException) -> str:
    """The first line of what another library's exception says, to quote in a `DataError`."""
    lines = str(error).strip().splitlines()
    text = lines[0][:300] if lines else type(error).__name__
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
