"""Several processes at work on one run, started by `accelerate launch` or `torchrun`; otherwise there is one.

Every process does the same: it loads the same rows, takes its part of every batch, and evaluates alike. What they sum
are gradients and losses; process 0 alone writes. Under FSDP2 (`linearize.sharding`) the weights are sharded besides.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from linearize.environment import launched
from linearize.errors import LinearizeError

T = TypeVar("T")
U = TypeVar("U")

# How long a process waits for another: process 0 tokenizes alone, and a teacher may be downloaded meanwhile.
PATIENCE = timedelta(hours=6)

# What accelerate's configuration may ask for, and where linearize takes it from instead.
ACCEPTED: dict[str, tuple[str, str]] = {
    "ACCELERATE_MIXED_PRECISION": ("no", "`mixed_precision: 'no'`; --dtype sets the precision"),
    "ACCELERATE_USE_DEEPSPEED": ("false", "FSDP2 in DeepSpeed's place (configs/launch/fsdp2.yaml)"),
    "FSDP_VERSION": ("2", "`fsdp_version: 2`"),
    "FSDP_RESHARD_AFTER_FORWARD": ("true", "`fsdp_reshard_after_forward: true`"),
    "FSDP_OFFLOAD_PARAMS": ("false", "`fsdp_offload_params: false`"),
    "FSDP_CPU_RAM_EFFICIENT_LOADING": (
        "false",
        "`fsdp_cpu_ram_efficient_loading: false`; each loads the teacher",
    ),
    "FSDP_ACTIVATION_CHECKPOINTING": ("false", "the recipe's `gradient_checkpointing` in its place"),
    "FSDP_STATE_DICT_TYPE": ("SHARDED_STATE_DICT", "`fsdp_state_dict_type: SHARDED_STATE_DICT`"),
}


@dataclass(frozen=True)
class Processes:
    """The processes of a run, seen from one of them.

    Attributes:
        rank: which one this is.
        count: how many there are.
        device: where this one computes.
        sharded: the model's layers are sharded over the processes (FSDP2).
    """

    rank: int = 0
    count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    sharded: bool = False

    @classmethod
    def start(cls, device: torch.device) -> Processes:
        """Join the processes that the launcher started; one alone needs nothing.

        Args:
            device: where the run goes; on GPUs each process takes its own.

        Raises:
            LinearizeError: the launcher's configuration asks for something that is not served, or is not whole.
        """
        if launched() == 1:
            return cls(device=device)
        from accelerate import PartialState

        _check_launcher()
        if device.index is not None:
            raise LinearizeError(
                f"--device {device} names one GPU, and {launched()} processes were started. Give --device "
                f"{device.type}; each process takes the GPU of its own number."
            )
        try:
            state = PartialState(cpu=device.type == "cpu", timeout=PATIENCE)
        except ValueError as error:  # of what a launcher sets beside WORLD_SIZE
            raise LinearizeError(
                f"WORLD_SIZE is {launched()} in the environment, but: {error}. Start with `accelerate launch` or "
                "`torchrun`, or unset it."
            ) from error
        sharded = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
        return cls(state.process_index, state.num_processes, state.device, sharded)

    @property
    def main(self) -> bool:
        """This process writes."""
        return self.rank == 0

    @property
    def host(self) -> torch.device:
        """Where the whole model lies: where it trains, or in the CPU's memory where the devices have shards of it."""
        return torch.device("cpu") if self.sharded else self.device

    def wait(self) -> None:
        """Wait for all processes to come here."""
        if self.count > 1:
            dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)

    def agreed(self, value: T) -> T:
        """Return process 0's value in every process."""
        if self.count == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, device=self.device)
        return values[0]

    def once(self, work: Callable[[], T]) -> T:
        """Let process 0 do some work and return what it returned, in every process.

        Raises:
            LinearizeError: process 0 raised one; then every process does.
        """
        if self.count == 1:
            return work()
        done: tuple[Any, str | None] = (None, None)
        if self.main:
            try:
                done = work(), None
            except LinearizeError as error:
                done = None, str(error)
        result, problem = self.agreed(done)
        if problem is not None:
            raise LinearizeError(problem)
        return result  # type: ignore[no-any-return]

    def in_turn(self, work: Callable[[], T]) -> T:
        """Do some work in every process, in process 0 first: what it puts in order, the others find in order."""
        if self.main:
            done = work()
        self.wait()
        if not self.main:
            done = work()
        return done

    def sum(self, numbers: Tensor) -> Tensor:
        """Return the sum over processes of a tensor, in a new one."""
        total = numbers.clone()
        if self.count > 1:
            dist.all_reduce(total)
        return total

    def largest(self, number: int) -> int:
        """Return the largest of the processes' numbers."""
        if self.count == 1:
            return number
        found = torch.tensor(number, device=self.device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return int(found)

    def part(self, rows: int) -> slice:
        """Return which of a batch's rows are this process's."""
        each = rows // self.count
        return slice(self.rank * each, (self.rank + 1) * each)

    def shared(self, items: Sequence[T], work: Callable[[T], U]) -> list[U]:
        """Return what `work` makes of each item, in order, in every process; each does its part of the work."""
        done: list[Any] = [None] * self.count
        dist.all_gather_object(done, [work(item) for item in items[self.rank :: self.count]])
        return [done[place % self.count][place // self.count] for place in range(len(items))]

    def mine(self, items: Iterable[T]) -> list[T]:
        """Return every count-th item, this process's own; under FSDP2 all, for what runs the model takes them all."""
        return list(items) if self.sharded else list(items)[self.rank :: self.count]

    def summed(self, losses: dict[str, Any]) -> dict[str, Any]:
        """Return the sum over processes of numbers by name, and by name and layer."""
        if self.count == 1:
            return losses
        numbers = torch.tensor(list(_numbers(losses)), dtype=torch.float64, device=self.device)
        return _filled(losses, iter(self.sum(numbers).tolist()))

    @torch.no_grad()
    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Bring the sum over processes of their gradients into each parameter; FSDP2 has summed those that it shards.

        A parameter that one process used and another did not has a gradient in both afterwards.
        """
        if self.count == 1:
            return
        whole = [parameter for parameter in parameters if not isinstance(parameter, DTensor)]
        used = torch.tensor([parameter.grad is not None for parameter in whole], dtype=torch.int32, device=self.device)
        dist.all_reduce(used, op=dist.ReduceOp.MAX)
        works = []
        for parameter in [p for p, found in zip(whole, used.tolist(), strict=True) if found]:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            works.append(dist.all_reduce(parameter.grad, async_op=True))
        for work in works:
            work.wait()

    def whole(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield tensors on the CPU by name, those that are sharded put together one at a time, in every process."""
        for name, tensor in tensors.items():
            full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            yield name, full.detach().cpu()


ALONE = Processes()


def leave() -> None:
    """End what `Processes.start` began, at the end of a command."""
    if dist.is_available() and dist.is_initialized():
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()


def _check_launcher() -> None:
    sharded = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    for name, (accepted, words) in ACCEPTED.items():
        found = os.environ.get(name, accepted)
        if found.lower() != accepted.lower() and (sharded or not name.startswith("FSDP_")):
            raise LinearizeError(
                f"The launcher's configuration sets {name} to {found}, which linearize does not serve. Use {words}."
            )


def _numbers(losses: Mapping[Any, Any]) -> Iterator[float]:
    for value in losses.values():
        yield from _numbers(value) if isinstance(value, Mapping) else [float(value)]


def _filled(like: Mapping[Any, Any], numbers: Iterator[float]) -> dict[Any, Any]:
    return {
        key: _filled(value, numbers) if isinstance(value, Mapping) else next(numbers) for key, value in like.items()
    }
