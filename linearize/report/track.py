"""Steps to TensorBoard or Weights & Biases, only where the user asked for one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from linearize.errors import LinearizeError, UnknownNameError

Log = Callable[[str, int, dict[str, float]], None]


def tracker(name: str, folder: Path) -> Log:
    """Return a function that logs numbers of a step.

    Args:
        name: `tensorboard` or `wandb`.
        folder: where they keep their files.

    Raises:
        UnknownNameError: `name` is neither.
        LinearizeError: the package is not installed.
    """
    makers = {"tensorboard": _tensorboard, "wandb": _wandb}
    if name not in makers:
        raise UnknownNameError("tracker", name, makers, "--track")
    try:
        return makers[name](folder)
    except ImportError as error:
        raise LinearizeError(f"--track {name} needs its package: pip install 'linearize[track]' ({error}).") from error


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
