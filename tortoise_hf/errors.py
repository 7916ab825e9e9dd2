"""The one exception whose message is meant for the person at the keyboard."""


class UserError(ValueError):
    """Something the user can mend; the message says where, what was found, what was expected and what to do next.

    Scripts print it without a traceback and leave with a non-zero exit code.
    """
