"""What all trainings share: the learning rate's way, precision, and a state as files without pickle.

A checkpoint is tensors as safetensors, and JSON with a digest of both.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from manifpt.errors import ConfigError

__all__ = ["State", "autocast", "cosine", "load_state", "save_state"]

_TENSORS, _FACTS = "state.safetensors", "state.json"


def cosine(part: float, warm_up: float, step: float) -> float:
    """What a learning rate is multiplied by: up in a straight line, then down to zero in half a cosine.

    Args:
        part: of all steps that are done, from 0 to 1.
        warm_up: the part in which it rises.
        step: one step's part.
    """
    if part < warm_up:
        return min(1.0, (part + step) / warm_up)
    return 0.5 * (1 + math.cos(math.pi * (part - warm_up) / (1 - warm_up)))


def autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    """bfloat16 where the device multiplies it faster than float32 and keeps float32's range: on a GPU.

    Not on CPUs with AMX: PyTorch 2.14 trains attributors 1.7 times as fast there, and stalls on an encoder's crops.
    """
    if device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.autocast("cuda", torch.bfloat16)
    return contextlib.nullcontext()


@dataclass(slots=True)
class State:
    """What training needs to go on: everything but the data, whose order follows from seed and epoch.

    Attributes:
        network, optimizer: state dicts.
        best: the network's state dict with the best validation accuracy so far.
        history: epochs done, each a dataclass of its training.
    """

    network: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    best: dict[str, torch.Tensor]
    history: list[Any] = field(default_factory=list)


def save_state(state: State, folder: Path) -> None:
    """Writes both files."""
    tensors: dict[str, torch.Tensor] = {}
    for kind, named in (("network", state.network), ("best", state.best)):
        tensors |= {f"{kind}/{name}": tensor.contiguous() for name, tensor in named.items()}
    numbers: dict[str, dict[str, Any]] = {}
    for parameter, slots in state.optimizer["state"].items():
        for slot, value in slots.items():
            if isinstance(value, torch.Tensor):
                tensors[f"optimizer/{parameter}/{slot}"] = value.detach().cpu().contiguous()
            else:
                numbers.setdefault(str(parameter), {})[slot] = value
    if state.best is state.network:  # safetensors refuses tensors that share memory
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("best/")}
    data = save(tensors)
    facts = {
        "groups": state.optimizer["param_groups"],
        "numbers": numbers,
        "history": [asdict(epoch) for epoch in state.history],
    }
    (folder / _TENSORS).write_bytes(data)
    (folder / _FACTS).write_text(json.dumps({"sha256": _digest(data, facts), **facts}))


def _digest(data: bytes, facts: dict[str, Any]) -> str:
    digest = hashlib.sha256(data)
    digest.update(json.dumps(facts, sort_keys=True).encode())
    return digest.hexdigest()


def load_state(folder: Path, epoch: Callable[..., Any] = dict) -> State:
    """The inverse of `save_state`.

    Args:
        folder: with both files.
        epoch: makes an entry of the history from its fields.

    Raises:
        ConfigError: the files are not those that were written: no other try would find other ones.
    """
    try:
        facts = json.loads((folder / _FACTS).read_text())
        data = (folder / _TENSORS).read_bytes()
        is_whole = facts.pop("sha256") == _digest(data, facts)
    except (FileNotFoundError, ValueError, LookupError, TypeError, AttributeError):
        is_whole = False
    if not is_whole:
        raise ConfigError(
            f"The checkpoint {folder} is damaged; delete the folder checkpoints/ to train from the start."
        )
    kinds: dict[str, dict[str, torch.Tensor]] = {"network": {}, "best": {}}
    slots: dict[int, dict[str, Any]] = {int(p): dict(values) for p, values in facts["numbers"].items()}
    for name, tensor in load(data).items():
        kind, _, rest = name.partition("/")
        if kind == "optimizer":
            parameter, _, slot = rest.partition("/")
            slots.setdefault(int(parameter), {})[slot] = tensor
        else:
            kinds[kind][rest] = tensor
    optimizer = {"state": slots, "param_groups": facts["groups"]}
    history = [epoch(**fields) for fields in facts["history"]]
    return State(kinds["network"], optimizer, kinds["best"] or kinds["network"], history)
