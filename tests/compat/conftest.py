"""NNI is imported by these tests with our patches armed, whichever of them runs first."""

import nni_plugins  # noqa: F401
