"""Orderings of compression methods, published or expected, held against what was measured."""

import dataclasses
import math
import re
import statistics
from collections.abc import Collection, Mapping, Sequence

from lowbit_jax.bench.compression_rows import SEEDLESS, pattern_of
from lowbit_jax.train.sweep_results import Record, Records, standard_error
from lowbit_jax.train.sweep_rows import Row

_MR_GPTQ, _WUSH = "arXiv:2509.23202", "arXiv:2512.00956"
_GPTQ, _WANDA, _SPARSEGPT = "arXiv:2210.17323", "arXiv:2306.11695", "arXiv:2301.00774"
_ELSA = "arXiv:2510.01650"

# Better, worse, who says so, in which formats (a regular expression), and whether inputs are
# quantized, too (None: either way). Of a pair the first line that fits counts: those without a
# source expect the order elsewhere. Both papers on FP4 have MXFP4's scale with 4/3 and INT4 in
# groups of 32; scales of GPTQ's are of rows, not groups. Left out is what lies within the noise of
# the papers: WUSH before MR-GPTQ before GPTQ in NVFP4, GPTQ before RTN in INT4 with inputs.
_IN_A_FORMAT: tuple[tuple[str, str, str | None, str, bool | None], ...] = (
    ("gptq", "rtn", _GPTQ, r"int[34](g\d+)?", False),
    ("gptq", "rtn", _MR_GPTQ, "mxfp4_fitted|nvfp4", True),
    ("mr_gptq", "gptq", _MR_GPTQ, "mxfp4_fitted", True),
    ("mr_gptq", "rtn", _MR_GPTQ, "nvfp4", True),
    ("rtn_hadamard", "rtn", _MR_GPTQ, "mxfp4_fitted|int4g32", True),
    ("rtn", "rtn_hadamard", _MR_GPTQ, "nvfp4", True),
    ("wush_rtn", "rtn_hadamard", _WUSH, "mxfp4_fitted|int4g32", True),
    ("wush", "mr_gptq", _WUSH, "mxfp4_fitted", True),
    ("gptq", "rtn", None, ".*", None),
    ("mr_gptq", "gptq", None, "mxfp4.*", None),
    ("mr_gptq", "rtn", None, "nvfp4", None),
    ("rtn_hadamard", "rtn", None, "mxfp4.*|int4.*", None),
    ("rtn", "rtn_hadamard", None, "nvfp4", None),
    ("wush_rtn", "rtn_hadamard", None, "mxfp4.*|nvfp4|int4.*", True),
    ("wush", "mr_gptq", None, "mxfp4.*|nvfp4", True),
)
# Better, worse, who says so, from how many zeros on. Elsa's retrained mask was Wanda's; the one
# here is SparseGPT's, a stronger control at 90 %.
_AT_A_SPARSITY = (
    ("wanda", "magnitude", _WANDA, 0.5),
    ("sparsegpt", "magnitude", _SPARSEGPT, 0.5),
    ("sparsegpt", "wanda", _WANDA, 0.7),
    ("elsa", "sparsegpt", _ELSA, 0.6),
    ("elsa", "retrain", _ELSA, 0.9),
)


@dataclasses.dataclass(frozen=True)
class Claim:
    """That one row loses less than another.

    Attributes:
      better: Name of the row.
      worse: Name of the other.
      source: Who published it; None: it is expected here, of a case that no paper has.
    """

    better: str
    worse: str
    source: str | None


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A claim with what was measured.

    Attributes:
      claim: What was to be expected.
      better: Mean of the row that should lose less.
      worse: Mean of the other.
      standard_error: Of their difference, from the seeds of both; None where it is not known, or
        where neither depends on a seed.
      word: "holds" and "reversed" where the difference is at least two standard errors, or neither
        depends on a seed; else "open", or "open (one seed)" where a row has one of several.
    """

    claim: Claim
    better: float
    worse: float
    standard_error: float | None
    word: str


def claims_of(rows: Sequence[Row]) -> list[Claim]:
    """The orderings of methods that the rows have, published ones and ours."""
    of_formats: dict[tuple[str, bool, bool], dict[str, Row]] = {}
    of_patterns: dict[str, dict[str, Row]] = {}
    for row in rows:
        given = row.arguments
        if "format" in given:
            key = given["format"], "activations" in given, bool(given.get("outliers"))
            of_formats.setdefault(key, {})[given["method"]] = row
        elif "pattern" in given:
            of_patterns.setdefault(given["pattern"], {})[given["method"]] = row
    claims: dict[tuple[str, str], Claim] = {}

    def claim(better: Row, worse: Row, source: str | None) -> None:
        found = Claim(better.name, worse.name, source)
        claims.setdefault((better.name, worse.name), found)

    for (format, is_both, is_injected), found in of_formats.items():
        for better, worse, source, formats, wanted in _IN_A_FORMAT:
            is_meant = re.fullmatch(formats, format) and wanted in (None, is_both)
            # Nobody published models with injected outliers.
            is_meant = is_meant and not (is_injected and source)
            if is_meant and better in found and worse in found:
                claim(found[better], found[worse], source)
    for (format, is_both, is_injected), found in of_formats.items():
        other = of_formats.get(("nvfp4", is_both, is_injected), {})
        if format.startswith("mxfp4") and "rtn" in found and "rtn" in other:
            is_published = format == "mxfp4_fitted" and is_both and not is_injected
            claim(other["rtn"], found["rtn"], _MR_GPTQ if is_published else None)
    for pattern, found in of_patterns.items():
        zeros = pattern_of(pattern).sparsity
        for better, worse, source, least in _AT_A_SPARSITY:
            if zeros >= least and better in found and worse in found:
                claim(found[better], found[worse], source)
    return list(claims.values())


def verdicts_of(rows: Sequence[Row], values: Mapping[str, Sequence[float]]) -> list[Verdict]:
    """What was measured of each claim of the rows, as far as both have values."""
    exact = {row.name for row in rows if row.arguments.get("method") in SEEDLESS}
    judged = [judge(claim, values, exact) for claim in claims_of(rows)]
    return [verdict for verdict in judged if verdict is not None]


def judge(
    claim: Claim, values: Mapping[str, Sequence[float]], exact: Collection[str] = ()
) -> Verdict | None:
    """What was measured of a claim; None where a row has no values yet.

    Args:
      claim: Of two rows.
      values: What each row loses, one value a seed.
      exact: Names of rows that depend on no seed, and so have no error.
    """
    names = claim.better, claim.worse
    if not all(values.get(name) for name in names):
        return None
    better, worse = (statistics.mean(values[name]) for name in names)
    errors = [standard_error(values[name]) for name in names if name not in exact]
    known = [error for error in errors if error is not None]
    error = math.hypot(*known) if errors and len(known) == len(errors) else None
    if errors and error is None:
        word = "open (one seed)"
    elif better == worse or abs(worse - better) < 2 * (error or 0.0):
        word = "open"
    else:
        word = "holds" if better < worse else "reversed"
    return Verdict(claim, better, worse, error, word)


def losses(rows: Sequence[Row], records: Records) -> dict[str, list[float]]:
    """What each row loses, a value a seed: the gap in loss to its baseline, or the layer error.

    A baseline with one seed serves all seeds of a row.
    """
    found = {}
    for row in rows:
        values = []
        for seed in row.seeds:
            value = _loss(records.get((row.name, seed)), records, row)
            if value is not None:
                values.append(value)
        found[row.name] = values
    return found


def _loss(record: Record | None, records: Records, row: Row) -> float | None:
    if record is None or "error" in record:
        return None
    loss = record.get("validation_loss")
    if loss is None:
        return record.get("layer_error")
    base = records.get((row.baseline or "", 0), {}).get("validation_loss")
    return None if base is None else loss - base
