"""Whether an optimizer may work slice by slice, read off its program.

The program is traced with first axes of a length that occurs nowhere else, and followed equation by
equation. Allowed on slices is what is known to take rows of the first axis one by one: whatever
else an optimizer does with them is refused, also if it would do no harm. Two things are not seen:
a size that Python has made a number of, as in a division by `p.size`, and what a primitive of
the list does beside its results.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax

from lowbit_jax.train.streaming import Group, Streams, flatten_streams

_ELEMENTWISE = frozenset(
    [
        "abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2", "atanh",
        "bitcast_convert_type", "cbrt", "ceil", "clamp", "clz", "convert_element_type", "copy",
        "copy_p", "cos", "cosh", "div", "eq", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1",
        "floor", "ge", "gt", "integer_pow", "is_finite", "le", "log", "log1p", "logistic", "lt",
        "max", "min", "mul", "ne", "neg", "nextafter", "not", "optimization_barrier", "or",
        "population_count", "pow", "reduce_precision", "rem", "round", "rsqrt", "select_n",
        "sharding_constraint", "shift_left", "shift_right_arithmetic", "shift_right_logical",
        "sign", "sin", "sinh", "sqrt", "square", "stop_gradient", "sub", "tan", "tanh", "xor",
    ]
)  # fmt: skip
_REDUCTIONS = frozenset(
    [
        "argmax", "argmin", "reduce_and", "reduce_max", "reduce_min", "reduce_or", "reduce_prod",
        "reduce_sum",
    ]
)  # fmt: skip
# Those along one axis, and the name of the parameter that says which.
_ALONG = {
    **dict.fromkeys(
        ("cumlogsumexp", "cummax", "cummin", "cumprod", "cumsum", "split", "stack", "unstack"),
        "axis",
    ),
    **dict.fromkeys(("concatenate", "sort"), "dimension"),
}
_CALLS = frozenset(
    [
        "checkpoint", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call",
        "custom_vjp_call_jaxpr", "jit", "pjit", "remat", "remat2",
    ]
)  # fmt: skip

_UNSIGNED = tuple(map(np.dtype, (np.uint8, np.uint16, np.uint32, np.uint64)))

# What a value depends on: numbers of groups, and these.
_KEY = "key"  # the key that the optimizer is given for a slice
_ALIEN = {
    "bits": "draws random bits that do not come from the key of its slice",
    "place": "asks where in its array a slice lies",
    "loop": "needs a loop",
}
_Labels = frozenset[int | str]
_NONE: _Labels = frozenset()


class _Mixes(Exception):
    """Says what an optimizer does that a slice does not allow."""


def check_sliceable(
    tx: optax.GradientTransformation, streams: Streams, groups: tuple[Group, ...], offload: str
) -> None:
    """Whether a slice's update follows from that slice alone, its key and what is in no group.

    Args:
      tx: The optimizer.
      streams: Shapes, or arrays.
      groups: How parameters are cut.
      offload: For the message.

    Raises:
      ValueError: If it does not, or is not known to; or if a part of the state has another first
        axis than its parameter.
    """
    flat = flatten_streams(streams, groups)
    sizes = {size for entry in flat.entries for size in entry.value.shape}
    mark = next(n for n in range(10_007, 10_007 + 2 * len(sizes) + 2, 2) if n not in sizes)
    shapes = []
    for entry in flat.entries:
        shape = entry.value.shape
        if entry.group is not None:
            group = groups[entry.group]
            if not shape or shape[0] != group.slices * group.rows:
                raise ValueError(
                    f"offload: {offload!r} lets the optimizer work slice by slice, and what it"
                    f" keeps for {entry.owner} must have its first axis,"
                    f" {group.slices * group.rows}, got an array of shape {shape}; choose another"
                    " optimizer or leave it out."
                )
            shape = (mark, *shape[1:])
        shapes.append(jax.ShapeDtypeStruct(shape, entry.value.dtype))

    def update(s, key):
        updates, opt_state = optax.with_extra_args_support(tx).update(
            s.gradients, s.opt_state, s.params, key=key
        )
        return Streams(s.params, opt_state, updates)

    program, shaped = jax.make_jaxpr(update, return_shape=True)(
        flat.unflatten(shapes), jax.random.key(0)
    )
    labels = [_NONE if e.group is None else frozenset((e.group,)) for e in flat.entries]
    try:
        results = _follow(program, [*labels, frozenset((_KEY,))], mark)
        for entry, found in zip(flatten_streams(shaped, groups).entries, results, strict=True):
            if entry.group is not None:
                _check_one(found | {entry.group}, "its results")
    except _Mixes as error:
        raise ValueError(
            f"offload: {offload!r} lets the optimizer work slice by slice, got one that {error};"
            " clip by the global norm in the step (clip_norm), and choose an optimizer that takes"
            " layers one by one."
        ) from None


def _follow(closed: Any, inputs: Sequence[_Labels], mark: int) -> list[_Labels]:
    """What the results of a program depend on.

    Args:
      closed: It, with its constants if it has any.
      inputs: What its arguments depend on.
      mark: Length of the first axis of slices.

    Raises:
      _Mixes: If it does with slices what is not in the lists above.
    """
    jaxpr = getattr(closed, "jaxpr", closed)
    known: dict[Any, _Labels] = dict(zip(jaxpr.invars, inputs, strict=True))
    for var in jaxpr.constvars:  # rows that may differ
        known[var] = frozenset(("place",)) if mark in var.aval.shape else _NONE

    def labels_of(var):
        return _NONE if hasattr(var, "val") else known[var]

    for equation in jaxpr.eqns:
        found = [labels_of(var) for var in equation.invars]
        name, parameters = equation.primitive.name, equation.params
        if name == "cond":
            branches = [_follow(b, found[1:], mark) for b in parameters["branches"]]
            results = [found[0].union(*parts) for parts in zip(*branches, strict=True)]
        elif name in _CALLS:
            inner = [p for key, p in parameters.items() if key in ("jaxpr", "call_jaxpr")]
            if len(inner) != 1 or len(getattr(inner[0], "jaxpr", inner[0]).invars) != len(found):
                raise _Mixes(f"may see several slices at once, in {name}")
            results = _follow(inner[0], found, mark)
        else:
            results = [_step(equation, _NONE.union(*found), mark)] * len(equation.outvars)
        for result in results:
            _check_one(result, name)
        known |= zip(equation.outvars, results, strict=True)
    return [labels_of(var) for var in jaxpr.outvars]


def _step(equation: Any, labels: _Labels, mark: int) -> _Labels:
    """What the results of one equation depend on, if those of `labels` are what it reads."""
    name, parameters = equation.primitive.name, equation.params
    has_rows = [mark in _shape(var) for var in equation.invars]
    makes_rows = any(mark in _shape(var) for var in equation.outvars)
    if name.startswith("random_") or name in ("threefry2x32", "rng_bit_generator", "rng_uniform"):
        if any(isinstance(label, int) for label in labels):
            raise _Mixes(f"makes a random key of a slice, in {name}")
        labels = labels if _KEY in labels else labels | {"bits"}
    elif any(has_rows):
        if not _takes_rows_one_by_one(equation, has_rows, mark):
            raise _Mixes(f"may see several slices at once, in {name}")
    elif name in ("scan", "while"):
        labels |= {"loop"}
    elif makes_rows and not (
        name == "broadcast_in_dim" or (name == "iota" and parameters["dimension"] > 0)
    ):
        labels |= {"place"}
    if _KEY in labels and all(var.aval.dtype in _UNSIGNED for var in equation.outvars):
        labels -= {"place"}  # random bits that are a hash of the key and the place of an entry
    if makes_rows and any(
        _shape(v)[0] != mark or _shape(v).count(mark) > 1
        for v in equation.outvars
        if mark in _shape(v)
    ):
        raise _Mixes(f"may see several slices at once, in {name}")
    return labels


def _takes_rows_one_by_one(equation: Any, has_rows: list[bool], mark: int) -> bool:
    """Whether row i of the results depends on rows i of what has rows, and on no other row."""
    name, p = equation.primitive.name, equation.params
    if any(_shape(var)[:1] != (mark,) for var in equation.outvars):
        return False
    if name in _ELEMENTWISE:
        return True
    if name in _REDUCTIONS:
        return 0 not in p["axes"]
    if name in _ALONG:
        return p[_ALONG[name]] != 0
    if name == "broadcast_in_dim":
        return p["broadcast_dimensions"][0] == 0
    if name == "reshape":
        return p.get("dimensions") is None
    if name in ("squeeze", "rev"):
        return 0 not in p["dimensions"]
    if name == "transpose":
        return p["permutation"][0] == 0
    if name == "pad":
        return tuple(p["padding_config"][0]) == (0, 0, 0)
    if name == "slice":  # all of the first axis, or the result would be shorter
        return True
    if name == "dot_general":
        contracted = p["dimension_numbers"][0]
        return all(0 not in axes for axes, rows in zip(contracted, has_rows, strict=False) if rows)
    return False


def _check_one(labels: _Labels, name: str) -> None:
    """Raises `_Mixes` unless a value of these labels follows from a slice of one group alone."""
    met = [label for label in labels if isinstance(label, int)]
    if len(met) > 1:
        raise _Mixes(f"brings slices of several parameters together, in {name}")
    for label in sorted(label for label in labels if isinstance(label, str)):
        if met and label in _ALIEN:
            raise _Mixes(_ALIEN[label])


def _shape(var: Any) -> tuple[int, ...]:
    return getattr(var.aval, "shape", np.shape(getattr(var, "val", 0)))
