"""The one exception whose message is all that a user needs to see, and what others say in one line."""


def reason(error: BaseException) -> str:
    """What an exception of another library says, as one line of at most 300 characters."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())[:300]


class UserError(Exception):
    """A mistake that the user can mend: one or two lines that name the thing, both values and the way out.

    The commands print it without a traceback and exit with status 1. Everything else keeps its traceback.
    """
