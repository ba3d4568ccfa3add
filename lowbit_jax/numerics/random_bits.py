"""Random bits by hashing a key and the place of an element: the same on every device and tiling.

`jax.random.bits` (threefry) takes about a hundred integer operations a number, several times what
the rest of a quantizer takes. To round by, ten are enough: each number must be uniform, and
neighbours in row, column or key must be independent as far as a test can tell. Nothing else may
rely on these bits: they are no generator for simulations, and none for cryptography. All
arithmetic is uint32, so that a GPU kernel computes the same ones.

Element (r, c) of an array with rows r along its last axis gets

    seed[r] = mix(mix(r ^ 0x9E3779B9 ^ key[0]) ^ key[1])        once a row
    word = mix(seed[r] ^ (32 * (c // 64) + c % 32))             once for two elements
    bits = word, or word with its halves swapped where c % 64 >= 32

Two elements 32 apart share a word: each has 32 uniform bits, and comparing both with thresholds
gives results that are independent up to 2**-16. Seeds have 32 bits: of the pairs of rows of n
columns a share of n / 2**33 or so have the same words in another order, 64 pairs in 16384 x 4096.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int, Shaped, UInt32

MULTIPLIERS = (0x21F0AAAD, 0xD35A2D97)  # of `mix`

Key = Shaped[Array, "..."]  # one key, typed or raw; other shapes raise an error of ours


def random_bits(key: Key, shape: tuple[int, ...]) -> UInt32[Array, "..."]:
    """32 uniform bits for each element of an array.

    Args:
      key: One key, of any implementation. Keys from `jax.random.split` or `fold_in` give unrelated
        bits; those that differ in their first word alone, as seeds 2**32 apart do, exchange rows.
      shape: `(*batch, k)`, at most 2**32 rows and columns. Rows are counted through the batch, so
        that merging or splitting batch axes changes nothing.

    Raises:
      ValueError: If there is more than one key.
    """
    *batch, k = shape or (1,)
    rows = int(np.prod(batch, dtype=np.int64))
    seeds = row_seeds(key, rows).reshape(*batch, 1)
    columns = lax.broadcasted_iota(jnp.uint32, (*batch, k), len(batch))
    return element_bits(seeds, columns).reshape(shape)


def row_seeds(key: Key, rows: int) -> UInt32[Array, "rows"]:
    """The seeds of the rows of an array, as in the module; each word of the key is mixed in."""
    words = jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key
    if words.ndim != 1:
        raise ValueError(f"random_bits: key must be one key, got shape {key.shape}; use jax.vmap.")
    seeds = jnp.arange(rows, dtype=jnp.uint32) ^ np.uint32(0x9E3779B9)  # mix(0) is 0
    for i in range(words.shape[0]):
        seeds = mix(seeds ^ words[i])
    return seeds


def element_bits(
    seeds: UInt32[Array, "..."], columns: UInt32[Array, "..."] | Int[Array, "..."]
) -> UInt32[Array, "..."]:
    """The bits of elements in rows of these seeds, at these columns; the two broadcast."""
    columns = columns.astype(jnp.uint32)
    word = pair_bits(seeds, columns // 64 * 32 + columns % 32)
    return jnp.where(columns % 64 < 32, word, swap_halves(word))


def pair_bits(seeds: UInt32[Array, "..."], pairs: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """The word of pair `32 * (c // 64) + c % 32`, that is of columns c and c + 32, c % 64 < 32."""
    return mix(seeds ^ pairs)


def swap_halves(word: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """The second element of a pair has its word turned by 16 bits."""
    return (word << 16) | (word >> 16)


def mix(h: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """A bijection of 32-bit words; one input bit turns each output bit in half of all cases.

    The multiplicative hash of two rounds that Chris Wellons' Hash Prospector (public domain) found.
    """
    h = (h ^ (h >> 16)) * np.uint32(MULTIPLIERS[0])
    h = (h ^ (h >> 15)) * np.uint32(MULTIPLIERS[1])
    return h ^ (h >> 15)
