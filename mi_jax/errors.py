"""The one error class that means: the caller's input is at fault."""


class InputError(ValueError):
    """A file or an argument given by the user cannot be used. The message is one line that names it and the fault."""
