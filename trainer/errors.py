"""The one exception of the trainer."""


class TrainingError(Exception):
    """What a user can mend: the message is one sentence that names the cause and what to do about it.

    The command line prints the message alone and exits with status 2.
    """


def disk_error_text(error: OSError) -> str:
    """One sentence for a file that could not be read or written."""
    what = f"{error.filename}: " if error.filename else ""
    return f"{what}{error.strerror or error}; mend that, then give the same command again"
