"""Published orderings of compression methods, held against what was measured."""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence

from lowbit_jax.train.sweep_results import Record, Records, standard_error
from lowbit_jax.train.sweep_rows import Row

_MR_GPTQ, _WUSH = "arXiv:2509.23202", "arXiv:2512.00956"
_GPTQ, _WANDA, _SPARSEGPT = "arXiv:2210.17323", "arXiv:2306.11695", "arXiv:2301.00774"
_ELSA = "arXiv:2510.01650"

# Better, worse, who says so, which formats (by their start), and whether inputs are quantized
# (None: either way). That MR-GPTQ beats GPTQ in NVFP4 is within the noise of the paper itself.
_IN_A_FORMAT: tuple[tuple[str, str, str, tuple[str, ...], bool | None], ...] = (
    ("gptq", "rtn", _GPTQ, ("mxfp4", "nvfp4", "int"), None),
    ("mr_gptq", "gptq", _MR_GPTQ, ("mxfp4",), None),
    ("mr_gptq", "rtn", _MR_GPTQ, ("nvfp4",), None),
    ("rtn_hadamard", "rtn", _MR_GPTQ, ("mxfp4", "int4"), None),
    ("rtn", "rtn_hadamard", _MR_GPTQ, ("nvfp4",), None),
    ("wush_rtn", "rtn_hadamard", _WUSH, ("mxfp4", "nvfp4", "int4"), True),
    ("wush", "mr_gptq", _WUSH, ("mxfp4", "nvfp4"), True),
)
# Better, worse, who says so, from how many zeros on.
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
      source: Who published it.
    """

    better: str
    worse: str
    source: str


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A claim with what was measured.

    Attributes:
      claim: What was published.
      better: Mean of the row that should lose less.
      worse: Mean of the other.
      standard_error: Of their difference, from the seeds of both; None where neither has several.
      word: "holds" and "reversed" where the difference is at least two standard errors (or has
        none), else "open".
    """

    claim: Claim
    better: float
    worse: float
    standard_error: float | None
    word: str


def published_claims(rows: Sequence[Row]) -> list[Claim]:
    """The orderings that were published of methods that the rows have."""
    of_formats: dict[tuple[str, bool, bool], dict[str, Row]] = {}
    of_patterns: dict[str, dict[str, Row]] = {}
    for row in rows:
        given = row.arguments
        if "format" in given:
            key = given["format"], "activations" in given, bool(given.get("outliers"))
            of_formats.setdefault(key, {})[given["method"]] = row
        elif "pattern" in given:
            of_patterns.setdefault(given["pattern"], {})[given["method"]] = row
    claims = []
    for (format, is_both, _), found in of_formats.items():
        for better, worse, source, formats, wanted in _IN_A_FORMAT:
            is_meant = format.startswith(formats) and wanted in (None, is_both)
            if is_meant and better in found and worse in found:
                claims.append(Claim(found[better].name, found[worse].name, source))
    for (format, *kind), found in of_formats.items():
        other = of_formats.get(("nvfp4", kind[0], kind[1]), {})
        if format == "mxfp4" and "rtn" in found and "rtn" in other:
            claims.append(Claim(other["rtn"].name, found["rtn"].name, _MR_GPTQ))
    for pattern, found in of_patterns.items():
        zeros = 0.5 if ":" in pattern else float(pattern.rstrip("%")) / 100
        for better, worse, source, least in _AT_A_SPARSITY:
            if zeros >= least and better in found and worse in found:
                claims.append(Claim(found[better].name, found[worse].name, source))
    return claims


def judge(claim: Claim, values: Mapping[str, Sequence[float]]) -> Verdict | None:
    """What was measured of a claim; None where a row has no values yet.

    Args:
      claim: Of two rows.
      values: What each row loses, one value a seed.
    """
    better, worse = (values.get(name, ()) for name in (claim.better, claim.worse))
    if not better or not worse:
        return None
    errors = [e for e in (standard_error(better), standard_error(worse)) if e is not None]
    error = math.hypot(*errors) if errors else None
    means = statistics.mean(better), statistics.mean(worse)
    difference = means[1] - means[0]
    if error is not None and abs(difference) < 2 * error:
        word = "open"
    else:
        word = "holds" if difference > 0 else "reversed" if difference < 0 else "open"
    return Verdict(claim, *means, error, word)


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
