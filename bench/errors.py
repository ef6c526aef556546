"""The error a person can mend."""


class UsageError(Exception):
    """What was given and what is allowed, in one line; `python -m bench` exits with 2."""
