"""The one exception whose message is all that a user needs to see."""


class UserError(Exception):
    """A mistake that the user can mend: one or two lines that name the thing, both values and the way out.

    The commands print it without a traceback and exit with status 1. Everything else keeps its traceback.
    """
