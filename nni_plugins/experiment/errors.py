"""The errors that the command line shows as one line."""


class ExperimentError(Exception):
    """An experiment cannot start, be read, or be finished; the text is one line that says what to do."""


class Interrupted(Exception):
    """The user pressed Ctrl-C, or the process was asked to end; the text says what was stopped and how to go on."""
