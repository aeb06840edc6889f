"""NNI 3.0 on today's torch and Python (placeholder: the import hook arrives with the first patch)."""


def arm() -> None:
    """Install the import hook that applies each patch when the NNI module it mends is imported."""
