"""How the command line speaks: errors, exit codes, completion, progress. The commands are in ``cli.py``."""
