"""Steps to TensorBoard or Weights & Biases, only where the user asked for one."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from linearize.errors import LinearizeError, UnknownNameError

Log = Callable[[str, int, dict[str, float]], None]


def check_tracker(name: str) -> None:
    """Raise unless a tracker can be had.

    Raises:
        UnknownNameError: `name` is neither `tensorboard` nor `wandb`.
        LinearizeError: the package is not installed.
    """
    if name not in MAKERS:
        raise UnknownNameError("tracker", name, MAKERS, "--track")
    if find_spec(name) is None:
        raise LinearizeError(f"--track {name} needs its package: pip install 'linearize[track]'.")


def tracker(name: str, folder: Path) -> Log:
    """Return a function that logs numbers of a step.

    Args:
        name: a tracker, which was checked.
        folder: where it keeps its files.

    Raises:
        LinearizeError: its package does not load.
    """
    try:
        return MAKERS[name](folder)
    except ImportError as error:  # a package that is there, and broken
        raise LinearizeError(f"--track {name} cannot load its package: {error}.") from error


def _tensorboard(folder: Path) -> Log:
    from torch.utils.tensorboard import SummaryWriter

    writer: Any = SummaryWriter(str(folder / "tensorboard"))

    def log(stage: str, step: int, numbers: dict[str, float]) -> None:
        for key, value in numbers.items():
            writer.add_scalar(f"{stage}/{key}", value, step)
        writer.flush()

    return log


def _wandb(folder: Path) -> Log:
    import wandb

    run = wandb.init(project="linearize", dir=str(folder))
    return lambda stage, step, numbers: run.log(
        {f"{stage}/{k}": v for k, v in numbers.items()} | {f"{stage}/step": step}
    )


MAKERS: dict[str, Callable[[Path], Log]] = {"tensorboard": _tensorboard, "wandb": _wandb}
