"""Which entries of a matrix stay: the least important ones go, exactly as many as asked.

A threshold alone cannot promise a number, for equal scores are common: dead inputs, bfloat16
weights, second moments of zero. Here ties are broken by position, so that every mask has the count
that it was asked for. The threshold is found by bisection on the bit patterns of the scores, 31
rounds of counting: a sharded array is counted where it lies, and nothing is sorted or gathered.
"""

import dataclasses
import math
import re
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree, Shaped

Comparison = Literal["matrix", "row", "column"]


@dataclasses.dataclass(frozen=True)
class Unstructured:
    """`floor(count * sparsity)` of `count` compared entries are zero, wherever they lie.

    Attributes:
      sparsity: Fraction that is removed, in [0, 1).
    """

    sparsity: int | float

    def __post_init__(self):
        if not 0 <= self.sparsity < 1:
            raise ValueError(
                f"Unstructured: sparsity must lie in [0, 1), got {self.sparsity}; it is the"
                " fraction that is removed."
            )

    def __str__(self) -> str:
        return f"{100 * self.sparsity:g} %"

    def removed(self, count: int) -> int:
        """How many of `count` entries go: the floor, 29 of 100 at a sparsity of 0.29."""
        return math.floor(round(count * self.sparsity, 6))


@dataclasses.dataclass(frozen=True)
class NM:
    """`n` of each `m` consecutive inputs of a row are **kept**: `NM(2, 4)` is "2:4".

    The flags of other programs often count the removed ones: their 1:4 is our 3:4.
    """

    n: int
    m: int

    def __post_init__(self):
        if not 0 < self.n <= self.m:
            raise ValueError(
                f"NM: n must lie in 1 .. m, got {self.n}:{self.m}; n is the number that is kept."
            )

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def sparsity(self) -> float:
        """Fraction that is removed."""
        return 1 - self.n / self.m


Pattern = Unstructured | NM


def parse_pattern(sparsity: float | None = None, n_of_m: str | None = None) -> Pattern:
    """The pattern of two flags of a command, of which exactly one is given.

    Args:
      sparsity: Fraction that is removed.
      n_of_m: Kept and of how many, such as "2:4".

    Raises:
      ValueError: If both or none are given, or either is out of range.
    """
    if (sparsity is None) == (n_of_m is None):
        raise ValueError(
            "parse_pattern: needs either a sparsity, such as 0.5, or a pattern, such as 2:4, got"
            f" {sparsity} and {n_of_m}."
        )
    if sparsity is not None:
        return Unstructured(sparsity)
    found = re.fullmatch(r"(\d+):(\d+)", str(n_of_m))
    if found is None:
        raise ValueError(
            "parse_pattern: a pattern is n:m, n kept of each m inputs, such as 2:4, got"
            f" {n_of_m!r}."
        )
    return NM(int(found[1]), int(found[2]))


def mask_of(
    scores: Shaped[Array, "..."], pattern: Pattern, per: Comparison = "matrix"
) -> Bool[Array, "..."]:
    """True for the entries that stay: those of the largest `|scores|` under `pattern`.

    Args:
      scores: `(*layers, n, k)`, any float dtype, or a vector, which counts as one row. Their
        magnitudes are compared in float32. A NaN ranks highest and stays.
      pattern: How many stay.
      per: Which entries of an `Unstructured` pattern compete: those of a matrix, of a row or of a
        column. `NM` always compares within its m.

    Returns:
      Bool of the shape of `scores`. Of equal scores the ones that come first go first.

    Raises:
      ValueError: If `m` does not divide `k`, if `scores` is not floating or if there is no such
        comparison.
    """
    if not jnp.issubdtype(scores.dtype, jnp.floating) or scores.ndim == 0:
        raise ValueError(
            f"mask_of: scores must be a floating array, got {scores.dtype} of shape"
            f" {scores.shape}; cast it or give it an axis."
        )
    bits = _magnitude_bits(scores)
    if isinstance(pattern, NM):
        return _n_of_m(bits, pattern)
    if scores.ndim == 1:
        return mask_of(scores[None], pattern, per)[0]
    if per == "column":
        return mask_of(scores.swapaxes(-1, -2), pattern, "row").swapaxes(-1, -2)
    if per == "row":
        bits = bits[..., None, :]
    elif per != "matrix":
        raise ValueError(f"mask_of: per must be 'matrix', 'row' or 'column', got {per!r}.")
    goes = pattern.removed(bits.shape[-1] * bits.shape[-2])
    threshold = _threshold([bits], goes)
    missing = goes - _count_below(bits, threshold)
    return _keep(bits, threshold, missing).reshape(scores.shape)


def masks_of_tree(scores: PyTree, pattern: Unstructured) -> PyTree:
    """`mask_of` with one budget for all leaves: the smallest scores of the whole tree go.

    Args:
      scores: Floating arrays, comparable with each other; at most 2^31 - 1 entries in all.
      pattern: Fraction of all entries that goes; leaves may keep all or nothing.

    Returns:
      Bools in the structure of `scores`. Of equal scores those of earlier leaves go first.

    Raises:
      ValueError: If the tree has more entries than an int32 counts.
    """
    leaves, treedef = jax.tree.flatten(scores)
    total = sum(leaf.size for leaf in leaves)
    if total >= 2**31:
        raise ValueError(
            f"masks_of_tree: at most 2**31 - 1 entries can be counted, got {total}; give groups"
            " of leaves budgets of their own."
        )
    goes = pattern.removed(total)
    matrices = [_magnitude_bits(leaf).reshape(-1, leaf.shape[-1]) for leaf in leaves]
    threshold = _threshold(matrices, goes)
    missing = goes - sum(_count_below(bits, threshold) for bits in matrices)
    masks = []
    for leaf, bits in zip(leaves, matrices, strict=True):
        masks.append(_keep(bits, threshold, missing).reshape(leaf.shape))
        missing = jnp.maximum(missing - jnp.sum(bits == threshold, dtype=jnp.int32), 0)
    return treedef.unflatten(masks)


def _magnitude_bits(scores: Float[Array, "..."]) -> Int[Array, "..."]:
    """Integers in the order of `|scores|`: the bit pattern without its sign."""
    return lax.bitcast_convert_type(scores.astype(jnp.float32), jnp.int32) & 0x7FFFFFFF


def _count_below(bits, threshold):
    """How many of a matrix lie below its threshold, `(*batch, 1, 1)`, or in all for a scalar."""
    axes = None if jnp.ndim(threshold) == 0 else (-2, -1)
    return jnp.sum(bits < threshold, axes, dtype=jnp.int32, keepdims=axes is not None)


def _threshold(matrices, goes: int):
    """The largest t with at most `goes` of the bits below it, a bit at a time from the top.

    One matrix has a t each, `(*batch, 1, 1)`; several share a scalar.
    """
    shape = (*matrices[0].shape[:-2], 1, 1) if len(matrices) == 1 else ()

    def round_of(i, t):
        candidate = t | (jnp.int32(1) << (30 - i))
        below = sum(_count_below(bits, candidate) for bits in matrices)
        return jnp.where(below <= goes, candidate, t)

    return lax.fori_loop(0, 31, round_of, jnp.zeros(shape, jnp.int32))


def _keep(bits, threshold, missing):
    """Drops what lies below the threshold, and of what lies on it the first `missing` entries."""
    ties = bits == threshold
    in_row = jnp.cumsum(ties, axis=-1, dtype=jnp.int32)
    a_row = in_row[..., -1:]
    position = in_row + jnp.cumsum(a_row, axis=-2, dtype=jnp.int32) - a_row
    return (bits > threshold) | (ties & (position > missing))


def _n_of_m(bits, pattern: NM):
    k, m = bits.shape[-1], pattern.m
    if k % m:
        raise ValueError(
            f"mask_of: {pattern} needs a last axis that is a multiple of {m}, got shape"
            f" {bits.shape}; choose another pattern for this matrix."
        )
    groups = bits.reshape(*bits.shape[:-1], k // m, m)
    # Rank 0 is the most important; of equal ones the later.
    ranks = jnp.zeros(groups.shape, jnp.int32)
    index = jnp.arange(m)
    for other in range(m):
        theirs = groups[..., other : other + 1]
        ranks += (theirs > groups) | ((theirs == groups) & (other > index))
    return (ranks < pattern.n).reshape(bits.shape)
