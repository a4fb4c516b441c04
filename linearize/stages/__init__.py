"""Stages: what recovers the quality that the swap cost."""

from __future__ import annotations

import shutil
from typing import Any

from linearize import checkpoint
from linearize.errors import LinearizeError
from linearize.stages.base import Run, StageRunner, train
from linearize.stages.distill import DistillRunner
from linearize.stages.finetune import FinetuneRunner
from linearize.stages.preference import PreferenceRunner
from linearize.stages.spikes import not_finite
from linearize.stages.transfer import TransferRunner

RUNNERS: dict[str, type[StageRunner]] = {
    "transfer": TransferRunner,
    "finetune": FinetuneRunner,
    "distill": DistillRunner,
    "preference": PreferenceRunner,
}


def run_stage(settings: Any, run: Run, name: str, runner: StageRunner | None = None) -> dict[str, float]:
    """Run one stage of a recipe to its end, or load what it ended with if it was run before.

    Args:
        settings: the stage, from the recipe.
        run: what the stages share; its model is changed in place.
        name: of the stage, unique in the run.
        runner: runs the stage; by its kind if None.

    Returns:
        Tokens and seconds of training.

    Raises:
        LinearizeError: it cannot go on, or what it trained is not finite.
    """
    runner = runner or RUNNERS[settings.stage](settings, run)
    ended = run.folder / f"{name}-ended"
    processes = run.processes
    found, broken = processes.in_turn(lambda: checkpoint.load(ended)), ended.with_name(f"{ended.name}.damaged")
    steps = settings.steps(run.corpus.train.length)
    run.tell({"event": "stage", "stage": name, "steps": steps, "ended": found is not None})
    if found is not None:
        run.ended.add(name)
        if run.surgery is not None:
            run.surgery.separate(found.tensors)
        run.model.load_state_dict(found.tensors, strict=False)
        return found.state
    if broken.exists():
        run.tell({"event": "damaged", "stage": name, "checkpoint": str(broken)})
        for path in list(run.folder.iterdir()) if processes.main else ():  # what later stages made of these weights
            if path.name.removesuffix("-ended") not in run.ended and path != broken:
                shutil.rmtree(path)

    def end(spent: dict[str, float]) -> None:
        tensors = {key: t for key, t in run.model.state_dict().items() if runner.changes(key)}
        if broken := not_finite(tensors.items()):
            raise LinearizeError(
                f"Stage {name!r} ended with weights that are not finite, {broken} among them, and is not kept. Lower "
                "its `optimizer.lr` or `optimizer.weight_decay`, and start anew with --fresh."
            )
        if processes.main:
            checkpoint.save(ended, checkpoint.distinct(tensors).items(), spent)
            checkpoint.remove(run.folder / name)
        processes.wait()
        run.ended.add(name)

    return train(runner, name, end)


__all__ = ["RUNNERS", "Run", "run_stage"]
