"""Parameters that are divided by their own norm, and so must not be masked where they have one.

Weight normalisation computes ``g * v / |v|``. Where a row of ``v`` is masked, its norm is zero, and the weight is 0/0;
with the row of ``g`` masked, and that of ``v`` left as it is, the row of the weight is zero, as was meant.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nni_plugins.channels.call import Info, Operator
from nni_plugins.channels.labels import Array


def unmasked(divisors: Sequence[tuple[Info, Array]], operators: Sequence[Operator]) -> set[tuple[str, int]]:
    """Return ``(parameter, dimension)`` for each dimension of a parameter that a divisor vanishes along.

    Parameters
    ----------
    divisors
        What is divided by, and its labels of the units where it would be zero.
    operators
        Those of the run; what made a divisor is looked for among them.
    """
    if not divisors:
        return set()
    made = {id(info): operator.inputs for operator in operators for info in operator.outputs if not info.dynamic}
    found: set[tuple[str, int]] = set()
    for divisor, labels in divisors:
        pending, seen = [divisor], {id(divisor)}
        while pending:
            info = pending.pop()
            if info.parameter:
                dims = enumerate(info.labels)
                found.update((info.parameter, d) for d, own in dims if own is not None and np.isin(own, labels).any())
            for source in made.get(id(info), ()):
                if id(source) not in seen:
                    seen.add(id(source))
                    pending.append(source)
    return found
