"""The life of a stage: prepare, train step by step with checkpoints, finish.

Whatever happens at a step is a function of the seed and the step's number, so a run that was killed and started again
ends with the same weights.
"""

from __future__ import annotations

import contextlib
import math
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from linearize import checkpoint
from linearize.data import Corpus, PackedRows, batches, rows_seen
from linearize.data.packing import cut
from linearize.errors import LinearizeError, memory_full
from linearize.interrupt import Signals, Stopped
from linearize.processes import Processes
from linearize.recipe_stages import EndToEnd, Stage
from linearize.report.metrics import MetricsWriter
from linearize.sharding import spread, training
from linearize.stages.gradients import alike, clip, layer_norms
from linearize.stages.meanwhile import windows_of
from linearize.stages.spikes import Spikes, diagnose
from linearize.surgery import Surgery

SAVE_SECONDS = 30.0
SAVE_COST = 1.5  # seconds; a checkpoint that takes longer is written less often, to keep below 5 % of the time
PLATEAU_STEPS = 100
PLATEAU_ROWS = 32
RATES = ("lr", "mixer_lr")
RANK_SEED = 1_000_003


@dataclass
class Run:
    """What all stages of a run share.

    Attributes:
        model: the student.
        surgery: how it was converted; None where nothing was.
        corpus: training and held-out rows.
        folder: where checkpoints go.
        seed: of the run.
        device: where the model is.
        autocast: dtype of the forward pass on a GPU, None for the weights' own.
        metrics: the run's metrics.jsonl.
        load_teacher: loads the teacher onto a device.
        teacher_copy: this stage's teacher must be loaded, because its weights are not the student's any more, or train.
        progress: takes the record of each step, to show it.
        tell: takes what else happens, as events.
        ended: names of the stages that are done.
        signals: says when the run is to stop.
        processes: that share the work.
    """

    model: Any
    surgery: Surgery | None
    corpus: Corpus
    folder: Path
    seed: int
    device: torch.device
    autocast: torch.dtype | None = None
    metrics: Path = Path("metrics.jsonl")
    progress: Callable[[dict[str, Any]], None] = lambda record: None
    load_teacher: Callable[[torch.device], Any] | None = None
    teacher_copy: bool = False
    tell: Callable[[dict[str, Any]], None] = lambda event: None
    ended: set[str] = field(default_factory=set)
    signals: Signals = field(default_factory=Signals)
    processes: Processes = field(default_factory=Processes)

    def modules(self) -> list[nn.Module]:
        """Return the model, and the attention modules that surgery keeps beside it."""
        return [self.model, *(self.surgery.beside() if self.surgery is not None else ())]

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context in which forward passes run."""
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast, cache_enabled=False)  # no cache: CUDA graphs


class StageRunner(ABC):
    """One stage on one model. Subclasses say what trains and how a batch turns into gradients.

    Attributes:
        trains_inside_forward: `backward` works inside the model's forward pass, where FSDP2 takes no gradients up.
    """

    trains_inside_forward = False

    def __init__(self, settings: Any, run: Run) -> None:
        self.settings = settings
        self.run = run
        self.seed = run.seed
        self.micro: int = min(settings.micro_batch or settings.batch, settings.batch // run.processes.count)

    def rows_seen(self) -> PackedRows:
        """Return the rows that the stage trains on, and those of its held-out loss where it reads that."""
        rows, settings = self.run.corpus.train, self.settings
        seen = rows_seen(rows, settings.batch, self.seed, settings.steps(rows.length))
        if settings.optimizer.schedule != "plateau":
            return seen
        return seen.joined(self.held_out())

    def held_out(self) -> PackedRows:
        """Return the rows of the stage's held-out loss, as long as those that it trains on."""
        corpus = self.run.corpus
        return cut(corpus.held_out[:PLATEAU_ROWS], corpus.train.length)

    def passes(self) -> int:
        """Return how many forward and backward passes the stage makes."""
        steps: int = self.settings.steps(self.run.corpus.train.length)
        return steps * -(-int(self.settings.batch) // self.run.processes.count // self.micro)

    def shrink(self) -> None:
        """Take half as many rows at a time from now on, because these did not fit into memory."""
        self.micro = max(1, self.micro // 2)

    @abstractmethod
    def prepare(self) -> dict[str, nn.Parameter]:
        """Set the model up and return what trains, by name."""

    def ready(self) -> None:  # noqa: B027
        """Bring what training needs besides, such as a teacher; the model is where it trains by then."""

    @abstractmethod
    def backward(self, rows: PackedRows, share: float) -> dict[str, Any]:
        """Add a micro-batch's gradients; return its losses, already multiplied by its share of the batch."""

    def batch(self, rows: PackedRows) -> PackedRows:
        """Return the rows of a step as the stage trains on them."""
        return rows

    @abstractmethod
    def held_out_loss(self, rows: PackedRows) -> float:
        """Return the stage's loss on rows without training on them."""

    @abstractmethod
    def finish(self) -> None:
        """Leave the model ready for evaluation, for the next stage and for saving."""

    @abstractmethod
    def changes(self, name: str) -> bool:
        """Return whether this stage changes the entry `name` of the model's state dict."""

    @property
    def rounds(self) -> int:
        """How often the stage's steps run, each time on other parameters."""
        return 1

    def begin(self, turn: int) -> None:  # noqa: B027  (most stages have nothing to do)
        """Get ready for round `turn`, from 0; a run that goes on begins the round that it is in."""

    def after_step(self, step: int) -> bool:
        """Look at the model behind optimizer step `step`; return whether the stage goes on."""
        return True

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds besides weights and optimizer, as JSON values."""
        return {}

    def resume(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Go on from what `state` returned."""

    def weights(self, rows: PackedRows) -> Tensor:
        """Return how much each row counts in the mean over a batch: its labelled tokens."""
        return rows.predicted().sum(1).double()

    def clip_groups(self, trained: dict[str, nn.Parameter]) -> list[list[nn.Parameter]]:
        """Return the sets of parameters whose gradient norms are clipped together."""
        return [list(trained.values())]


def is_mixer(name: str) -> bool:
    """Return whether a trained parameter is a mixer's own."""
    return ".mixer." in name


def stage_seed(seed: int, name: str) -> int:
    """Return the seed of a stage by that of the run."""
    return seed * 1000 + sum(name.encode())


def learning_rate(settings: Stage, step: int, steps: int, peak: float | None = None) -> float:
    """Return the scheduled learning rate of a step (cosine and constant; plateau starts from the peak).

    Args:
        settings: the stage's.
        step: steps done before.
        steps: of the stage.
        peak: highest rate; the optimizer's `lr` by default.
    """
    optimizer = settings.optimizer
    highest = optimizer.lr if peak is None else peak
    warmup = round(optimizer.warmup * steps)
    if step < warmup:
        return highest * (step + 1) / (warmup + 1)
    if optimizer.schedule != "cosine":
        return highest
    progress = (step - warmup) / max(1, steps - warmup)
    return optimizer.min_lr + (highest - optimizer.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def train(
    runner: StageRunner, name: str, end: Callable[[dict[str, float]], None] = lambda spent: None
) -> dict[str, float]:
    """Run a stage to its end, from its last checkpoint if there is one.

    Args:
        runner: the stage.
        name: of its checkpoint and in its records.
        end: keeps what the stage ended with, before anything can stop the run.

    Returns:
        Tokens and seconds of training, those before an interruption included.

    Raises:
        LinearizeError: the loss or a gradient was not finite, or had a spike, for too many steps in a row.
        Stopped: a signal came; the checkpoint has all steps that were made.
    """
    run = runner.run
    seed = stage_seed(run.seed, name)
    torch.manual_seed(seed)
    runner.seed = seed
    trained = runner.prepare()
    dtypes = {key: parameter.dtype for key, parameter in trained.items()}
    for parameter in trained.values():
        parameter.data = parameter.data.float()
    # Several processes stop together, behind the same step.
    together = run.signals.later() if run.processes.count > 1 else contextlib.nullcontext()
    with windows_of(run.model, runner.settings.window), together:  # graphs captured meanwhile go in `finish`
        with training(runner, trained) as (worker, working):
            steps = Steps(worker, working, name)
            steps.run()
        try:
            with run.signals.later():
                runner.finish()
                for key, parameter in trained.items():
                    parameter.data = parameter.data.to(dtypes[key])
                end(steps.spent)
                steps.saves.step = steps.progress.step
        except Stopped as stopped:
            steps.stop(stopped)
            raise
    return steps.spent


class Steps:
    """The steps of a stage, from its last checkpoint if there is one.

    Args:
        runner: the stage, prepared.
        trained: what trains, by name.
        name: of the stage.
    """

    def __init__(self, runner: StageRunner, trained: dict[str, nn.Parameter], name: str) -> None:
        self.runner, self.trained, self.name = runner, trained, name
        run, settings = runner.run, runner.settings
        self.each = settings.steps(run.corpus.train.length)
        self.rounds = runner.rounds
        self.total = self.each * self.rounds
        self.tokens = settings.batch * run.corpus.train.length
        self.progress = Progress(trained, settings)
        self.progress.spikes = Spikes(self.total)
        folder = run.folder / name
        runner.resume(self.progress.restore(folder, run.processes, run.tell))
        self.saves = Saves(folder, self.progress, runner)
        self.groups = runner.clip_groups(trained)

    @property
    def spent(self) -> dict[str, float]:
        """Tokens and seconds of training so far."""
        tokens = self.progress.step * self.tokens // self.rounds
        return {"tokens": float(tokens), "seconds": self.progress.seconds}

    def stop(self, stopped: Stopped) -> None:
        """Save, and tell where the stage is."""
        self.saves.save()
        stopped.kept = f"Stage {self.name!r} is at step {self.progress.step} of {self.total}; {self.saves.words}"

    def run(self) -> None:
        """Make the steps that are left.

        Raises:
            LinearizeError: too many steps in a row could not be made.
            Stopped: a signal came; everything is saved.
        """
        run, progress = self.runner.run, self.progress
        self.runner.ready()
        log = MetricsWriter(run.metrics, resume=(self.name, progress.step)) if run.processes.main else None
        source: Iterator[PackedRows] = iter(())
        more, begun = True, -1
        try:
            with log or contextlib.nullcontext():
                while more and progress.step < self.total:
                    turn, step = divmod(progress.step, self.each)
                    if turn != begun:
                        self.runner.begin(turn)
                        begun = turn
                        rows, batch = run.corpus.train, self.runner.settings.batch
                        source = batches(rows, batch, self.runner.seed, start_step=step)
                    with run.signals.later():
                        more, record = self._step(source, step)
                        if log is not None:
                            log.write(self.name, progress.step, **record)
                        run.progress({"stage": self.name, "step": progress.step, "steps": self.total, **record})
                        if more and progress.step < self.total and run.processes.agreed(self.saves.due):
                            self.saves.save()
                    run.signals.agree(run.processes)
        except Stopped as stopped:
            self.stop(stopped)
            raise

    def _step(self, source: Iterator[PackedRows], step: int) -> tuple[bool, dict[str, Any]]:
        """Make one step; return whether the stage goes on, and the step's record."""
        began = time.monotonic()
        runner, progress, settings = self.runner, self.progress, self.runner.settings
        processes = runner.run.processes
        torch.manual_seed(runner.seed + progress.step)
        progress.schedule(step, self.each)
        batch = runner.batch(next(source))
        if processes.rank:  # dropout of its own
            torch.manual_seed(runner.seed + progress.step + RANK_SEED * processes.rank)
        losses = processes.summed(_gradients(runner, batch, self.trained))
        processes.sum_gradients(self.trained.values())
        norms = layer_norms(self.trained, processes)
        norm = clip(self.groups, settings.optimizer.clip, processes)
        fit = progress.spikes.fit(losses["loss"], norm)
        if progress.spikes.too_many:
            where = diagnose(runner, batch, losses, norms)
            raise progress.spikes.error(self.name, progress.step + 1, self.saves.words, where)
        progress.advance(lambda: processes.agreed(runner.held_out_loss(runner.held_out())), fit)
        more = runner.after_step(progress.step)
        spent = time.monotonic() - began
        progress.seconds += spent
        record = {**losses, "tokens": progress.step * self.tokens // self.rounds}
        record |= {"tokens_per_second": self.tokens / spent, **progress.rates, "grad_norm": norm}
        record |= {"grad_norms": norms, "skipped": progress.spikes.skipped}
        return more, record


class Saves:
    """Writes a stage's checkpoints, not too often.

    Args:
        folder: of the checkpoint.
        progress: that it holds.
        runner: the stage.
    """

    def __init__(self, folder: Path, progress: Progress, runner: StageRunner) -> None:
        self.folder = folder
        self.progress = progress
        self.runner = runner
        self.step = progress.step
        self.at = time.monotonic()
        self.cost = 0.0

    @property
    def due(self) -> bool:
        """Whether it is time for a checkpoint: never while steps are being skipped, so that the last one is good."""
        waited = time.monotonic() - self.at
        return waited > SAVE_SECONDS * max(1.0, self.cost / SAVE_COST) and not self.progress.spikes.streak

    @property
    def words(self) -> str:
        """Say which checkpoint is the last."""
        if not self.step:
            return "nothing was saved yet"
        return f"the last checkpoint is that of step {self.step}, in {self.folder}"

    def save(self) -> None:
        """Write one, if a step was made since the last; no process leaves before it is written."""
        if self.step == self.progress.step:
            return
        began = time.monotonic()
        processes = self.runner.run.processes
        self.progress.save(self.folder, self.runner.state(), processes)
        processes.wait()
        self.step, self.at = self.progress.step, time.monotonic()
        self.cost = self.at - began


class Progress:
    """How far a stage is: its optimizer, its schedule and its step, all of which a checkpoint holds.

    Args:
        trained: what trains, by name.
        settings: the stage's.
    """

    def __init__(self, trained: dict[str, nn.Parameter], settings: Stage) -> None:
        self.trained = trained
        self.settings = settings
        wanted = settings.optimizer
        own = {name: parameter for name, parameter in trained.items() if is_mixer(name) and wanted.mixer_lr is not None}
        rest = [parameter for name, parameter in trained.items() if name not in own]
        peaks = [(rest, wanted.lr), (list(own.values()), wanted.mixer_lr)]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": part, "lr": peak, "peak": peak, "name": name}
                for name, (params, peak) in zip(RATES, [entry for entry in peaks if entry[0]], strict=False)
                for part in alike(params)
            ],
            betas=wanted.betas,
            weight_decay=wanted.weight_decay,
            fused=next(iter(trained.values())).is_cuda if trained else None,
        )
        self.plateau: torch.optim.lr_scheduler.ReduceLROnPlateau | None = None
        if wanted.schedule == "plateau":
            self.plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
                self.optimizer, factor=0.1, patience=10, min_lr=wanted.min_lr
            )
        self.step = 0
        self.seconds = 0.0
        self.spikes = Spikes()

    @property
    def rates(self) -> dict[str, float]:
        """The learning rates in force: `lr`, and `mixer_lr` where the mixers have their own."""
        return {group["name"]: float(group["lr"]) for group in self.optimizer.param_groups}

    def schedule(self, step: int, steps: int) -> None:
        """Set the learning rates of step `step` of `steps`; behind its warm-up, a plateau sets its own."""
        if self.plateau is None or step < round(self.settings.optimizer.warmup * steps):
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(self.settings, step, steps, group["peak"])

    def advance(self, held_out_loss: Callable[[], float], fit: bool = True) -> None:
        """Make the optimizer's step with the gradients at hand, if they are fit for it, and drop them."""
        if fit:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if self.plateau is not None and self.step % PLATEAU_STEPS == 0:
            self.plateau.step(held_out_loss())

    def save(self, folder: Path, more: dict[str, Any], processes: Processes) -> None:
        """Write the checkpoint, with what the stage's runner keeps besides; process 0 writes."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.trained.items():
            tensors[name] = parameter
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"{key}@{name}"] = value
        state: dict[str, Any] = {"step": self.step, "seconds": self.seconds, "rates": self.rates, "runner": more}
        state["spikes"] = self.spikes.state()
        if self.plateau is not None:
            state["plateau"] = {key: getattr(self.plateau, key) for key in ("best", "num_bad_epochs", "last_epoch")}
        whole = processes.whole(tensors) if processes.sharded else tensors.items()
        if processes.main:
            checkpoint.save(folder, whole, state)
        elif processes.sharded:
            deque(whole, maxlen=0)  # takes part in putting each tensor together

    def restore(
        self, folder: Path, processes: Processes, tell: Callable[[dict[str, Any]], None] = lambda event: None
    ) -> dict[str, Any]:
        """Go on from the checkpoint, if there is one, and return what the stage's runner keeps.

        Args:
            folder: of the checkpoint.
            processes: that all go on from it.
            tell: takes the event that says which checkpoint is used.
        """
        found = processes.in_turn(lambda: checkpoint.load(folder))
        if found is None:
            return {}
        tensors, state, damaged = found
        tell({"event": "resume", "checkpoint": str(folder), "step": state["step"], "damaged": damaged})
        for full, tensor in tensors.items():
            key, _, name = full.rpartition("@")
            like = self.trained[name]
            if key:
                whole = key == "step"  # on a GPU the fused optimizer counts there
                self.optimizer.state[like][key] = tensor.to(like.device) if whole else spread(tensor, like)
            else:
                like.data.copy_(spread(tensor, like))
        for key, value in state.get("plateau", {}).items():
            setattr(self.plateau, key, value)
        for group in self.optimizer.param_groups:
            group["lr"] = state["rates"][group["name"]]
        self.step, self.seconds = int(state["step"]), float(state["seconds"])
        self.spikes.resume(state["spikes"])
        kept: dict[str, Any] = state["runner"]
        return kept


def _gradients(runner: StageRunner, rows: PackedRows, trained: dict[str, nn.Parameter]) -> dict[str, Any]:
    """Put the gradients of a batch into what trains, as many rows at a time as memory holds; return its losses.

    Raises:
        LinearizeError: memory does not hold one row, or under FSDP2 as many as are asked for.
    """
    while True:
        try:
            return _accumulate(runner, rows, runner.micro)
        except RuntimeError as error:
            said = memory_full(error)
            if said is None:
                raise
            if runner.micro == 1 or runner.run.processes.sharded:  # under FSDP2 the others are in the same pass
                raise _no_room(runner, rows.length, said) from error
        runner.shrink()
        for parameter in trained.values():
            parameter.grad = None
        torch.cuda.empty_cache()
        runner.run.tell({"event": "memory", "rows": runner.micro})


def _no_room(runner: StageRunner, length: int, said: str) -> LinearizeError:
    """Return the error for a stage that memory does not hold, with what takes less of it."""
    settings = runner.settings
    ways = ["give rows fewer tokens (`data.length`, or the stage's `length`)", "end what else runs on this device"]
    if runner.micro > 1:
        ways.insert(0, f"set the stage's `micro_batch` below {runner.micro}")
    if isinstance(settings, EndToEnd) and not settings.gradient_checkpointing:
        ways.insert(0, "set the stage's `gradient_checkpointing` to true")
    todo = "; or ".join(ways)
    count = "one row" if runner.micro == 1 else f"{runner.micro} rows"
    return LinearizeError(
        f"Memory is full in the stage `{settings.stage}` with {count} of {length:,} tokens at a time ({said}). "
        f"{todo[0].upper()}{todo[1:]}."
    )


def _accumulate(runner: StageRunner, rows: PackedRows, micro: int) -> dict[str, Any]:
    """Add the gradients of this process's part of a batch, `micro` rows at a time; return its part of the losses."""
    processes = runner.run.processes
    total: dict[str, Any] = {}
    for part, share in _micro_batches(rows, runner.weights(rows), micro, processes.part(len(rows))):
        if processes.count == 1:
            runner.run.signals.check()  # gradients are lost, nothing else
        for key, value in runner.backward(part, share).items():
            if isinstance(value, dict):
                before = total.get(key, {})
                total[key] = {part: before.get(part, 0.0) + loss for part, loss in value.items()}
            else:
                total[key] = total.get(key, 0.0) + value
    return total


def _micro_batches(rows: PackedRows, weights: Tensor, micro: int, part: slice) -> Iterator[tuple[PackedRows, float]]:
    """Pieces of a part of a batch with their shares of the whole batch's weight."""
    for start in range(part.start, part.stop, micro):
        piece = slice(start, min(start + micro, part.stop))
        yield rows[piece], float(weights[piece].sum() / weights.sum())
