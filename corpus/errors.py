"""The one exception of the corpus."""


class CorpusError(Exception):
    """What a user can mend: the message is a sentence that names the cause and what to do about it."""
