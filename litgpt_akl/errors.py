"""The one exception whose message is all that a user needs to see, and what others say in one line."""

from litgpt_akl.display import quoted, shown


def reason(error: BaseException) -> str:
    """What an exception of another library says, as one line of at most 300 characters."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return quoted(" ".join(text.split()))


class UserError(Exception):
    """A mistake that the user can mend: one or two lines that name the thing, both values and the way out.

    The commands print it without a traceback and exit with status 1. Everything else keeps its traceback. What it
    quotes may come from data or a URL: it is made fit to be shown, and credentials are masked.
    """

    def __init__(self, message: str) -> None:
        super().__init__(shown(message))
