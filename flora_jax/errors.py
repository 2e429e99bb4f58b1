"""The one base of errors that a user's input causes. A bug in the program is never one of them."""


class InputError(ValueError):
    """Bad input; the message is one line with the file, what was found and what was expected."""
