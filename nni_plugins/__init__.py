"""nni-plugins: pruners, verified speedup and search for NNI.

Importing this package is cheap: it imports neither NNI nor torch. It arms the patches of
:mod:`nni_plugins.compat`, each of which is applied when the NNI module that it mends is imported.
"""

from nni_plugins.compat import arm

__version__ = "0.1.0"

arm()
