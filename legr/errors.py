"""The one exception for mistakes in what a user hands in: a sentence, not a traceback."""


class UserError(ValueError):
    """Names the parameter or file, its value and what is allowed."""
