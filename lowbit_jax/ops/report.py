"""What ran: the quantized products of a function, the path each took, and why."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax

from lowbit_jax.ops.dispatch import parse_scope
from pallas_kernels.mixed_matmul.layout import TILE

# Names of the products' kernels in a program.
_MIXED_KERNEL = "lowbit_mixed_matmul"
_KERNELS = ("lowbit_scaled_matmul", _MIXED_KERNEL)
_BLOCK_SCALED = "scaled_matmul_wrapper"  # of the primitive behind jax.nn.scaled_matmul
_REMAT_SCOPE = "rematted_computation"  # what jax.checkpoint calls the part that it runs again


@dataclasses.dataclass(frozen=True)
class ProductRow:
    """One product `a b^T`, or several alike in one place.

    Attributes:
      where: Scopes round it, joined by "/": module path, then names given by `jax.named_scope`.
      product: "y", "dx" or "dw".
      a_shape: Shape of the first operand of the product as it runs, batch axes of vmap included.
      b_shape: Shape of the second.
      a_format: Format of the first operand, "-" if it is not quantized.
      b_format: Format of the second.
      path: The implementation.
      reason: Why this one.
      count: How often one call runs it, scans multiplied out; None inside a `while_loop`, whose
        length is not known. Of the branches of a `cond`, each is counted as if it ran.
    """

    where: str
    product: str
    a_shape: tuple[int, ...]
    b_shape: tuple[int, ...]
    a_format: str
    b_format: str
    path: str
    reason: str
    count: int | None


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The products of one function, in the order of its program; `str` is a table."""

    rows: tuple[ProductRow, ...]

    def __str__(self) -> str:
        if not self.rows:
            return "explain: no product of quantized_dot in this function"
        header = ("where", "product", "shapes", "formats", "path", "count", "reason")
        cells = [
            (
                row.where or "-",
                row.product,
                f"{row.a_shape} x {row.b_shape}",
                f"{row.a_format} x {row.b_format}",
                row.path,
                "?" if row.count is None else str(row.count),
                row.reason,
            )
            for row in self.rows
        ]
        widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
        lines = [header, tuple("-" * width for width in widths), *cells]
        return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def explain(fn: Callable | jax.stages.Traced, *args: Any, **kwargs: Any) -> Explanation:
    """Lists every product of `quantized_dot` and `coded_dot` that `fn(*args, **kwargs)` runs.

    Traces `fn` and reads its program; nothing is computed. Products inside `jit` (compiled already
    or not), `scan`, `vmap`, `jax.checkpoint` and module calls are found. The gradient products
    appear if `fn` takes a gradient: explain `jax.grad(loss)`, or a training step. What
    `jax.checkpoint` computes again counts again.

    Args:
      fn: Any function that JAX can trace. Bind arguments that are not arrays first, with
        `functools.partial` or a lambda. Or what `jax.jit(fn).trace(...)` has made of it.
      *args: Its arguments, unless it has been traced; `jax.ShapeDtypeStruct` will do for arrays.
      **kwargs: Its keyword arguments.

    Returns:
      The rows in program order, those alike in every field but `count` added up.

    Raises:
      ValueError: If what has been traced comes with arguments.
    """
    is_traced = isinstance(fn, jax.stages.Traced)
    if is_traced and (args or kwargs):
        raise ValueError(
            f"explain: a traced function has its arguments, got {len(args) + len(kwargs)} more;"
            " leave them out, or pass the function."
        )
    program = fn.jaxpr if is_traced else jax.make_jaxpr(fn)(*args, **kwargs)
    counts: dict[ProductRow, int | None] = {}
    for row in _rows(program.jaxpr, (), 1):
        key = dataclasses.replace(row, count=None)
        so_far = counts.get(key, 0)
        counts[key] = None if so_far is None or row.count is None else so_far + row.count
    return Explanation(tuple(dataclasses.replace(row, count=n) for row, n in counts.items()))


def _rows(jaxpr, outer_scopes: tuple[str, ...], count: int | None) -> Iterator[ProductRow]:
    """The products of a program: an inner program's scopes continue those of the call to it."""
    for eqn in jaxpr.eqns:
        scopes = outer_scopes + _scopes(eqn)
        is_block_scaled = eqn.primitive.name == _BLOCK_SCALED
        is_product = is_block_scaled or eqn.primitive.name == "dot_general"
        if is_product or eqn.params.get("name") in _KERNELS:
            fields = next(filter(None, map(parse_scope, reversed(scopes))), None)
            if fields is not None:
                where = [s for s in scopes if parse_scope(s) is None and s not in _KERNELS]
                b_shape = eqn.invars[1].aval.shape[is_block_scaled:]
                if eqn.params.get("name") == _MIXED_KERNEL:  # words by tiles, as it reads them
                    b_shape = tuple(TILE * tiles for tiles in b_shape[:2])
                yield ProductRow(
                    where="/".join(where),
                    product=fields.product,
                    # Block-scaled products have a batch axis of length 1.
                    a_shape=eqn.invars[0].aval.shape[is_block_scaled:],
                    b_shape=b_shape,
                    a_format=fields.a,
                    b_format=fields.b,
                    path=fields.path,
                    reason=fields.reason,
                    count=count,
                )
        inner_count = count
        if eqn.primitive.name == "scan" and count is not None:
            inner_count = count * eqn.params["length"]
        elif eqn.primitive.name == "while":
            inner_count = None
        for inner in _programs(eqn.params.values()):
            yield from _rows(inner, scopes, inner_count)


def _programs(values) -> Iterator:
    """The programs among an equation's parameters, alone or in a list, closed or open."""
    for value in values:
        if isinstance(value, tuple | list):
            yield from _programs(value)
        elif hasattr(value, "eqns"):
            yield getattr(value, "jaxpr", value)


def _scopes(eqn) -> tuple[str, ...]:
    """Names of the scopes that an equation was traced in, without transformations like `jvp`."""
    stack = eqn.source_info.name_stack.stack
    names = tuple(s.name for s in stack if type(s).__name__ == "Scope" and s.name != _REMAT_SCOPE)
    # The backward pass of jax.checkpoint repeats the scopes round it.
    half = len(names) // 2
    return names[:half] if half and names[:half] == names[half:] else names
