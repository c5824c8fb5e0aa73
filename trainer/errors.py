"""The one exception of the trainer."""


class TrainingError(Exception):
    """What a user can mend: the message is one sentence that names the cause and what to do about it.

    The command line prints the message alone and exits with status 2.
    """
