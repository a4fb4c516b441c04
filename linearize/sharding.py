"""FSDP2: a copy of a model whose layers are sharded over the processes, while the whole stays in the CPU's memory.

Each stage and each evaluation shards anew, when it is known what trains and in which dtype, and a stage's result is
put together again one tensor at a time.
"""

from __future__ import annotations

import contextlib
import copy
import gc
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from linearize.modeling.classes import layers_of
from linearize.modeling.heads import logits_head
from linearize.processes import Processes

Place = tuple[nn.Module, str]


def twin(thing: Any, kept: Iterable[Any] = ()) -> tuple[Any, dict[int, nn.Parameter]]:
    """Return a copy of a model, or of what holds one, whose parameters are new and share the old ones' memory.

    Args:
        thing: to be copied.
        kept: objects in it that the copy has too.

    Returns:
        The copy, and its parameters by the `id` of the old ones.
    """
    models = [thing] if isinstance(thing, nn.Module) else thing.run.modules()
    memo: dict[int, Any] = {id(one): one for one in kept}
    made = {}
    for model in models:
        for parameter in model.parameters():
            if id(parameter) not in made:
                made[id(parameter)] = nn.Parameter(parameter.detach(), parameter.requires_grad)
    memo.update(made)
    return copy.deepcopy(thing, memo), made


def shard(model: Any, processes: Processes, whole: Iterable[nn.Parameter] = (), train_all: bool = False) -> None:
    """Shard a decoder's layers in place, and bring the rest of the model to this process's device.

    Gradients of what is sharded arrive summed over the processes.

    Args:
        model: of a known family, on any device.
        processes: over which.
        whole: parameters that every process keeps whole, and whose gradients it sums itself.
        train_all: shard embeddings too, where the head does not share them; frozen ones stay whole.
    """
    gc.collect()  # earlier copies hold themselves in cycles
    decoder = model.get_decoder()
    mesh = init_device_mesh(processes.device.type, (processes.count,))
    layers = layers_of(model)
    inside = {parameter for layer in layers for parameter in layer.parameters()}
    head = logits_head(model)
    outside = {parameter for parameter in decoder.parameters() if parameter not in inside}
    shared = outside & set(head.parameters())
    kept = set(whole)
    settings: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": True}
    for layer in layers:
        fully_shard(layer, ignored_params=kept, **settings)
    fully_shard(decoder, ignored_params=kept | (shared if train_all else outside), **settings)
    if train_all and isinstance(head, nn.Linear) and not shared:
        fully_shard(head, mesh=mesh, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    move(model, processes.device)


def move(module: nn.Module, device: torch.device) -> None:
    """Bring what is not sharded of a module to a device; its parameters stay the same objects."""
    for part in module.modules():
        for parameter in part._parameters.values():
            if parameter is not None and not isinstance(parameter, DTensor):
                parameter.data = parameter.data.to(device)
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else buffer.to(device)


@contextlib.contextmanager
def evaluating(model: Any, processes: Processes) -> Iterator[Any]:
    """Give the model, or under FSDP2 a sharded copy that runs alike in all processes."""
    if not processes.sharded:
        yield model
        return
    made, _ = twin(model)
    shard(made, processes)
    yield made


@contextlib.contextmanager
def training(runner: Any, trained: dict[str, nn.Parameter]) -> Iterator[tuple[Any, dict[str, nn.Parameter]]]:
    """Give a stage's runner that is prepared and what it trains; under FSDP2 a sharded copy of both.

    What the copy has learnt is in the runner's own model at the end.

    Args:
        runner: a `StageRunner`.
        trained: what its `prepare` returned.
    """
    run = runner.run
    processes: Processes = run.processes
    if not processes.sharded:
        yield runner, trained
        return
    same = [value for name, value in vars(run).items() if name not in ("model", "surgery")]
    worker, made = twin(runner, kept=(runner.settings, *same))
    worker.run.device = processes.device
    new = {name: made[id(parameter)] for name, parameter in trained.items()}
    modules = worker.run.modules()
    places = _places(modules, new)
    replicated = new.values() if worker.trains_inside_forward else ()
    shard(worker.run.model, processes, replicated, train_all=getattr(worker.settings, "train", "") == "full")
    for module in modules[1:]:
        move(module, processes.device)
    working = {name: getattr(*places[name]) for name in trained}
    yield worker, working
    for name, tensor in processes.whole(working):
        trained[name].data.copy_(tensor)


def _places(modules: list[nn.Module], wanted: dict[str, nn.Parameter]) -> dict[str, Place]:
    """Where each parameter hangs."""
    names = {id(parameter): name for name, parameter in wanted.items()}
    found: dict[str, Place] = {}
    for part in (part for module in modules for part in module.modules()):
        for key, parameter in part._parameters.items():
            if id(parameter) in names:
                found.setdefault(names[id(parameter)], (part, key))
    return found


def spread(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a whole tensor as `like` is: on its device, or this process's shard of it."""
    if not isinstance(like, DTensor):
        return tensor.to(like.device)
    on_device = tensor.to(like.to_local().device)
    return distribute_tensor(on_device, like.device_mesh, like.placements, src_data_rank=None)
