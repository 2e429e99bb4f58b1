"""The bases of errors that a user is told of in one line. A bug in the program is never one of them."""


class InputError(ValueError):
    """Bad input; the message is one line with the file, what was found and what was expected."""


class RunError(RuntimeError):
    """Work that began and cannot go on, though nothing in the input looked wrong; one line says why."""


def one_line(error: Exception) -> str:
    """What another library's error says, without its line breaks; its type where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def listing(head: str, problems: list[str], most: int = 20) -> str:
    """One message of all problems, up to ``most`` of them by name."""
    rest = [f"and {len(problems) - most} more"] if len(problems) > most else []
    return f"{head}: " + "; ".join([*problems[:most], *rest])
