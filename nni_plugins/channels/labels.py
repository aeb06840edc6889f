"""Labels: one integer for every index of every parameter dimension, and what is known to hold between them.

While a run is watched, rules only *collect*: ties (these indices go together), products (this dimension is the
flattened pair of those two), frozen labels (they must stay) and inexact labels (removing is not masking).
:meth:`Labels.solve` then turns the collection into classes of labels that must be kept or removed at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

if TYPE_CHECKING:
    from collections.abc import Sequence

Array = np.ndarray
MaybeLabels = Array | None


@dataclass(frozen=True)
class Cause:
    """Where something was decided: the operator, and the module whose forward called it."""

    module: str
    operator: str
    why: str = ""

    def __str__(self) -> str:
        where = f"{self.operator} in {self.module or 'the model'}" if self.operator else (self.module or "the model")
        return f"{self.why} ({where})" if self.why else where


@dataclass(frozen=True)
class Product:
    """``whole[i * len(inner) + j]`` stands for the pair ``(outer[i], inner[j])``."""

    whole: Array
    outer: Array
    inner: Array


@dataclass
class Solution:
    """What the labels came to: ``classes[label]``, and per class whether it is frozen or inexact, and why.

    ``heads`` says, per class, whether it is one of those that :meth:`Labels.prefer` named, and ``head_dims`` whether it
    is the other factor of a product with one of them.
    """

    classes: Array
    frozen: Array
    inexact: Array
    frozen_cause: Array
    inexact_cause: Array
    causes: list[Cause | None]
    heads: Array
    head_dims: Array

    def __len__(self) -> int:
        return len(self.frozen)

    def why_frozen(self, klass: int) -> Cause | None:
        index = int(self.frozen_cause[klass])
        return self.causes[index] if index < len(self.causes) else None

    def why_inexact(self, klass: int) -> Cause | None:
        index = int(self.inexact_cause[klass])
        return self.causes[index] if index < len(self.causes) else None


class Labels:
    """The collection of labels of one watched run."""

    def __init__(self) -> None:
        self.count = 0
        self._ties: list[tuple[Array, Array]] = []
        self._frozen: list[tuple[Array, int]] = []
        self._inexact: list[tuple[Array, int]] = []
        self._preferred: list[Array] = []
        self._whole_groups: list[Array] = []
        self._products: list[Product] = []
        self._product_of: dict[tuple[bytes, bytes], Array] = {}
        self._causes: list[Cause | None] = []

    def fresh(self, size: int) -> Array:
        """Return ``size`` new labels, tied to nothing."""
        labels = np.arange(self.count, self.count + size, dtype=np.int64)
        self.count += size
        return labels

    def tie(self, a: MaybeLabels, b: MaybeLabels, cause: Cause) -> None:
        """Say that ``a[i]`` and ``b[i]`` go together; what is tied to something fixed (None) is frozen."""
        if a is None and b is None:
            return
        if a is None or b is None:
            self.freeze(b if a is None else a, cause)
        elif a is not b:
            self._ties.append((a, b))

    def freeze(self, labels: MaybeLabels, cause: Cause | None) -> None:
        """Say that these must stay. A cause of None is for what nobody would want to prune, and is not reported."""
        if labels is not None and len(labels):
            self._frozen.append((labels, len(self._causes)))
            self._causes.append(cause)

    def mark_inexact(self, labels: MaybeLabels, cause: Cause) -> None:
        """Say that removing these is not the same as masking them."""
        if labels is not None and len(labels):
            self._inexact.append((labels, len(self._causes)))
            self._causes.append(cause)

    @property
    def inexact_count(self) -> int:
        """How often :meth:`mark_inexact` has marked something."""
        return len(self._inexact)

    def forget_inexact(self, marks: slice) -> None:
        """Take back some of the marks, by their place in the order of marking; the places of others stay."""
        for place in range(*marks.indices(len(self._inexact))):
            labels, cause = self._inexact[place]
            self._inexact[place] = (labels[:0], cause)

    def prefer(self, labels: MaybeLabels, *, heads: bool = True) -> None:
        """Say that, of a product's two factors, this one is the one to prune: attention heads, or groups of a norm."""
        if labels is not None and len(labels):
            (self._preferred if heads else self._whole_groups).append(labels)

    def relate(self, whole: MaybeLabels, outer: Array, inner: Array, cause: Cause) -> None:
        """Say that ``whole`` is the flattened pair (outer, inner)."""
        if whole is None:
            self.freeze(outer, cause)
            self.freeze(inner, cause)
        elif len(inner) == 1:
            self.tie(whole, outer, cause)
        elif len(outer) == 1:
            self.tie(whole, inner, cause)
        else:
            self._products.append(Product(whole, outer, inner))

    def merge(self, outer: Array, inner: Array, cause: Cause) -> Array:
        """Return the labels of the flattened pair (outer, inner), the same ones for the same pair."""
        key = (outer.tobytes(), inner.tobytes())
        if key not in self._product_of:
            whole = self.fresh(len(outer) * len(inner))
            self._product_of[key] = whole
            self.relate(whole, outer, inner, cause)
        return self._product_of[key]

    def product_of(self, outer: Array, inner: Array) -> MaybeLabels:
        """Return the labels of the flattened pair (outer, inner), if there are any."""
        return self._product_of.get((outer.tobytes(), inner.tobytes()))

    def split(self, whole: Array, sizes: Sequence[int], cause: Cause) -> list[MaybeLabels]:
        """Return the labels of the dimensions that ``whole`` is cut into; None where nothing varies along one."""
        table = whole.reshape(tuple(sizes))
        varies = [bool((table != table.take([0], axis=axis)).any()) for axis in range(len(sizes))]
        along = [axis for axis, varied in enumerate(varies) if varied]
        out: list[MaybeLabels] = [None] * len(sizes)
        if not along:  # all the same label: it stands for every index, none of which can go alone
            self.freeze(np.unique(whole), cause)
            return out
        table = table[tuple(slice(None) if v else 0 for v in varies)]
        self._split(table, along, out, cause)
        return out

    def _split(self, table: Array, along: list[int], out: list[MaybeLabels], cause: Cause) -> None:
        if len(along) == 1:
            out[along[0]] = np.ascontiguousarray(table)
            return
        outer = self.fresh(table.shape[0])
        inner = self.fresh(int(np.prod(table.shape[1:])))
        whole = np.ascontiguousarray(table).reshape(-1)
        self._product_of.setdefault((outer.tobytes(), inner.tobytes()), whole)
        self.relate(whole, outer, inner, cause)
        out[along[0]] = outer
        self._split(inner.reshape(table.shape[1:]), along[1:], out, cause)

    # -- solving ---------------------------------------------------------------------------------------------------

    def solve(
        self,
        extra_frozen: Sequence[tuple[Array, Cause]] = (),
        *,
        preferred: bool = True,
        narrowed: Sequence[Array] = (),
        extra_ties: Sequence[tuple[Array, Array]] = (),
    ) -> Solution:
        """Close over ties and products, and return the classes.

        Each product keeps at most one factor prunable: a frozen product freezes both, a frozen factor ties the product
        to the other one. Of two free factors the exact one stays free, if only one is; else the preferred one; else the
        one with more indices. With ``preferred=False`` it is the one that is not preferred, exact or not; so it is for
        the preferred ones among ``narrowed``.
        """
        frozen_items = self._frozen + [(labels, len(self._causes) + i) for i, (labels, _) in enumerate(extra_frozen)]
        causes = self._causes + [cause for _, cause in extra_frozen]
        none = len(causes)
        cause_of = np.full(self.count, none, dtype=np.int64)
        for labels, index in reversed(frozen_items):
            cause_of[labels] = index
        ties = [*self._ties, *extra_ties]
        open_products = list(self._products)
        classes = self._components(ties)
        self._tie_equal_products(open_products, classes, ties)
        while True:
            classes = self._components(ties)
            class_cause = _minimum_per_class(classes, cause_of, none)
            cause_of = class_cause[classes]
            progress, undecided = self._close(open_products, cause_of, none, ties)
            if progress:
                open_products = undecided
                continue
            if not undecided:
                break
            wish = self._heads(classes).astype(np.int64) * (1 if preferred else -1)
            wish += 2 * self._marked(classes, self._whole_groups)
            if preferred:  # what is not asked for in particular: rather what can go exactly
                wish -= 4 * self._inexact_factors(classes, undecided)
            wish -= 16 * self._marked(classes, list(narrowed))
            asked = [p for p in undecided if self._wishes(p, classes, wish)[0] != self._wishes(p, classes, wish)[1]]
            for product in asked or undecided:
                self._decide(product, classes, wish, class_cause, none)
            cause_of = class_cause[classes]
            open_products = undecided

        inexact_of = np.full(self.count, none, dtype=np.int64)
        for labels, index in reversed(self._inexact):
            inexact_of[labels] = index
        inexact_cause = _minimum_per_class(classes, inexact_of, none)
        frozen_cause = np.where(class_cause == _DECIDED, none + 1, class_cause)
        return Solution(
            classes=classes,
            frozen=class_cause != none,
            inexact=inexact_cause != none,
            frozen_cause=frozen_cause,
            inexact_cause=inexact_cause,
            causes=causes,
            heads=self._heads(classes),
            head_dims=self._head_dims(classes),
        )

    def _marked(self, classes: Array, arrays: list[Array]) -> Array:
        marked = np.zeros(int(classes.max(initial=-1)) + 1, dtype=bool)
        for labels in arrays:
            marked[classes[labels]] = True
        return marked

    def _inexact_factors(self, classes: Array, products: list[Product]) -> Array:
        """Which classes are inexact, factors of an inexact product included."""
        marked = self._marked(classes, [labels for labels, _ in self._inexact])
        for product in products:
            if marked[classes[product.whole]].any():
                marked[classes[product.outer]] = True
                marked[classes[product.inner]] = True
        return marked

    def _heads(self, classes: Array) -> Array:
        """What is preferred; where that is a pair (heads of keys shared by several queries), its outer factor too."""
        heads = self._marked(classes, self._preferred)
        for product in self._products:
            if heads[classes[product.whole]].any():
                heads[classes[product.outer]] = True
        return heads

    def _head_dims(self, classes: Array) -> Array:
        heads = self._heads(classes)
        others = [p.inner for p in self._products if heads[classes[p.outer]].any()]
        others += [p.outer for p in self._products if heads[classes[p.inner]].any()]
        return self._marked(classes, others) & ~heads

    def _components(self, ties: list[tuple[Array, Array]]) -> Array:
        if not ties:
            return np.arange(self.count)
        left = np.concatenate([a for a, _ in ties])
        right = np.concatenate([b for _, b in ties])
        matrix = coo_matrix((np.ones(len(left), dtype=np.int8), (left, right)), shape=(self.count, self.count))
        return connected_components(matrix, directed=False)[1].astype(np.int64)

    def _tie_equal_products(self, products: list[Product], classes: Array, ties: list[tuple[Array, Array]]) -> None:
        first: dict[tuple[bytes, int], Product] = {}
        for product in products:
            key = (classes[product.whole].tobytes(), len(product.outer))
            twin = first.setdefault(key, product)
            if twin is not product:
                ties.append((twin.outer, product.outer))
                ties.append((twin.inner, product.inner))

    def _close(
        self, products: list[Product], cause_of: Array, none: int, ties: list[tuple[Array, Array]]
    ) -> tuple[bool, list[Product]]:
        """One round: settle every product that has a frozen part. Returns whether one was settled, and what is open."""
        progress, undecided = False, []
        for product in products:
            rows, columns = len(product.outer), len(product.inner)
            whole = cause_of[product.whole].reshape(rows, columns)
            frozen_whole = whole != none
            if frozen_whole.any():
                np.minimum.at(cause_of, product.outer, whole.min(axis=1))
                np.minimum.at(cause_of, product.inner, whole.min(axis=0))
            outer_frozen = bool((cause_of[product.outer] != none).any())
            inner_frozen = bool((cause_of[product.inner] != none).any())
            if not outer_frozen and not inner_frozen:
                undecided.append(product)
                continue
            progress = True
            if inner_frozen:
                cause_of[product.inner] = np.minimum(cause_of[product.inner], cause_of[product.inner].min())
                ties.append((product.whole, np.repeat(product.outer, columns)))
            else:
                cause_of[product.outer] = np.minimum(cause_of[product.outer], cause_of[product.outer].min())
                ties.append((product.whole, np.tile(product.inner, rows)))
        return progress, undecided

    @staticmethod
    def _wishes(product: Product, classes: Array, wish: Array) -> tuple[int, int]:
        """How much it is wished that each factor of a product stays free."""
        outer, inner = wish[classes[product.outer]], wish[classes[product.inner]]
        return int(outer[np.abs(outer).argmax()]), int(inner[np.abs(inner).argmax()])

    def _decide(self, product: Product, classes: Array, wish: Array, class_cause: Array, none: int) -> None:
        outer, inner = classes[product.outer], classes[product.inner]
        if (class_cause[outer] != none).any() or (class_cause[inner] != none).any():
            return  # a product decided before it in this round shares a factor
        wish_outer, wish_inner = self._wishes(product, classes, wish)
        keep_inner = wish_inner > wish_outer if wish_inner != wish_outer else len(inner) > len(outer)
        class_cause[outer if keep_inner else inner] = _DECIDED


_DECIDED = -1


def _minimum_per_class(classes: Array, values: Array, none: int) -> Array:
    out = np.full(int(classes.max(initial=-1)) + 1, none, dtype=np.int64)
    np.minimum.at(out, classes, values)
    return out
