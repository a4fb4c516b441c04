"""`metrics.jsonl`: one JSON object a logged step, appended as training goes.

A record has `stage`, `step` (from 1, within the stage), `loss`, `tokens` (trained so far in the stage),
`tokens_per_second`, `grad_norm` before clipping, `grad_norms` of each layer by its index (`rest`: outside of layers),
`skipped` (steps so far that were not made, since their loss or gradient was not finite or had a spike), and what the
stage adds; transfer adds `layers`, the loss of each layer by its index. The name of a stage is its own within a run.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from linearize.checkpoint import write_text
from linearize.errors import LinearizeError

Record = dict[str, Any]


def read_metrics(path: Path) -> list[Record]:
    """Return the records of a file, without a last line that was cut off; none if there is no file.

    Raises:
        LinearizeError: another line is damaged.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise LinearizeError(
                f"Line {number} of {path} is not JSON ({error}). Remove that line, or start the run again with --fresh."
            ) from error
    return records


def rewind(path: Path, stage: str, step: int) -> None:
    """Remove what was logged after a checkpoint, so that the steps that are run again do not appear twice.

    Args:
        path: the file; nothing happens if there is none.
        stage: the stage of the checkpoint.
        step: the steps of that stage that the checkpoint has behind it; 0 before its first.
    """
    kept: list[Record] = []
    entered = False
    for record in read_metrics(path):
        inside = record["stage"] == stage
        if (inside and record["step"] > step) or (entered and not inside):
            break
        entered = entered or inside
        kept.append(record)
    if path.exists():
        beside = path.with_name(path.name + ".tmp")
        write_text(beside, "".join(json.dumps(record) + "\n" for record in kept))
        os.replace(beside, path)


def finite(value: Any) -> Any:
    """Return the value with numbers that JSON does not know (NaN, infinity) as None."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): finite(entry) for key, entry in value.items()}
    return value


class MetricsWriter:
    """Appends records to a file, each flushed at once.

    Args:
        path: the file; what it has stays.
        resume: (stage, step) of the checkpoint that the run goes on from; later records are removed first. None leaves
            out nothing but a last line that was cut off.
    """

    def __init__(self, path: Path, resume: tuple[str, int] | None = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if resume is not None:
            rewind(path, *resume)
        elif path.exists():
            whole = path.read_bytes().rpartition(b"\n")
            os.truncate(path, len(whole[0]) + len(whole[1]))
        self._file = path.open("a", encoding="utf-8")

    def write(
        self,
        stage: str,
        step: int,
        *,
        loss: float,
        tokens: int,
        tokens_per_second: float,
        layers: Mapping[int, float] | None = None,
        **more: float | Mapping[str, float],
    ) -> None:
        """Append one record.

        Args:
            stage: name of the stage.
            step: optimizer steps done in it, this one included.
            loss: mean loss of the step.
            tokens: trained so far in the stage.
            tokens_per_second: since the last record.
            layers: loss of each layer by its index, in stages that have such.
            more: further numbers, such as `lr`.
        """
        record: Record = {"stage": stage, "step": step, "loss": loss, "tokens": tokens}
        record["tokens_per_second"] = round(tokens_per_second, 1)
        record |= {"layers": layers} if layers else {}
        self._file.write(json.dumps(finite(record | more)) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
