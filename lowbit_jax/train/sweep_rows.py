"""Rows of a sweep: which runs a line of its table is the mean of, and what it is compared with."""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of a table: runs that differ in their seeds alone.

    Attributes:
      name: Of the row; its runs lie in folders NAME-sSEED.
      config: Configuration file, as from the folder in which the sweep is started.
      arguments: Of the config's `get_config`, without the seed. Others have their defaults.
      seeds: One run each.
      baseline: Name of the row from which the gap is taken, seed by seed; None: no gap.
      group: Heading under which the row stands.
      anchor: Published result to compare with, and on how many tokens.
      branch_of: Name of a row with `stop_after`, from whose run of the same seed the runs of this
        one start.
      stop_after: Steps after which a run is saved and left, for others to branch off; the row
        has no line in the table.
      save: Write checkpoints, for runs that are long enough to be resumed. Without them an
        interrupted run starts over.
    """

    name: str
    config: str
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    baseline: str | None = None
    group: str = ""
    anchor: str = ""
    branch_of: str | None = None
    stop_after: int | None = None
    save: bool = False

    @property
    def has_result(self) -> bool:
        """Whether it is a line of the table."""
        return self.stop_after is None

    @property
    def speed_key(self) -> str:
        """Equal for rows whose steps do the same work; a sum of strengths changes none of it."""
        arguments = dict(self.arguments)
        if "cage_total_strength" in arguments:
            arguments["cage_total_strength"] = bool(arguments["cage_total_strength"])
            if not arguments["cage_total_strength"]:
                del arguments["cage_total_strength"]
        return json.dumps([self.config, arguments], sort_keys=True, default=str)


def check_rows(rows: Sequence[Row]) -> None:
    """Whether the rows fit together.

    Raises:
      ValueError: If a name is used twice or unfit for a folder, if a baseline or a base is
        missing, or if a row branches off from one that does not stop or lacks some of its seeds.
    """
    by_name = {row.name: row for row in rows}
    for row in rows:
        if by_name[row.name] is not row:
            raise ValueError(f"check_rows: names must differ, got {row.name!r} twice.")
        if not re.fullmatch(r"[A-Za-z0-9._+-]+", row.name):
            raise ValueError(
                "check_rows: a name must be fit for a folder (letters, digits, . _ + -), got"
                f" {row.name!r}."
            )
        if "seed" in row.arguments:
            raise ValueError(f"check_rows: {row.name} must state its seeds in `seeds`.")
        for other in (row.baseline, row.branch_of):
            if other is not None and other not in by_name:
                raise ValueError(f"check_rows: {row.name} needs a row {other!r}; there is none.")
        if row.branch_of is None:
            continue
        base = by_name[row.branch_of]
        if base.stop_after is None or not set(row.seeds) <= set(base.seeds):
            raise ValueError(
                f"check_rows: {row.name} can branch off only from a row with `stop_after` and its"
                f" seeds {row.seeds}, got {base.name} with stop_after={base.stop_after} and seeds"
                f" {base.seeds}."
            )
