"""How long a pass must take at least: its arithmetic, and its traffic with memory, counted part by part.

A part must read what it did not make itself (weights, what earlier parts left) once each time it runs, and write what
outlives it; what it makes and uses up may stay in caches. Whichever takes longer at the device's limits, that or its
arithmetic, is its floor (the roofline of Williams et al. 2009).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from .parts import listening

aten, mkldnn = torch.ops.aten, torch.ops.mkldnn
REST = "rest"
"""Name of what is in no part."""


def _linear_flops(x: Any, weight: Any, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    return int(2 * out_val.numel() * weight.shape[1])


def _binary_flops(x: Any, other: Any, weight: Any, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    return int(2 * out_val.numel() * weight.shape[1])


def _attention_flops(query: Any, key: Any, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    return int(4 * query.numel() * key.shape[2])


def _attention_backward_flops(grad: Any, query: Any, key: Any, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    return int(10 * query.numel() * key.shape[2])


ON_A_CPU: Mapping[Any, Any] = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}
"""What torch's own counter of arithmetic leaves out on a CPU; heads may share keys. Backward, five products: scores
again, and the gradients of scores, values, queries and keys."""
for _formula in ON_A_CPU.values():
    _formula._get_raw = True  # takes tensors, not shapes
FUSED: Mapping[Any, Any] = {
    mkldnn._linear_pointwise.default: _linear_flops,
    mkldnn._linear_pointwise.binary: _binary_flops,
}
GATHERS = frozenset({aten.embedding, aten.index, aten.index_select, aten.gather, aten.embedding_dense_backward})
"""What reads as much as it writes, whatever it chooses from."""


@dataclass
class Counted:
    """What a part does, all its calls together.

    Attributes:
        calls: How often it runs.
        flops: Arithmetic.
        bytes: Traffic with memory that cannot be left out.
    """

    calls: int = 0
    flops: float = 0.0
    bytes: float = 0.0

    def floor_s(self, flops_per_s: float, bytes_per_s: float) -> float:
        """Least time at a device's limits [s]."""
        return max(self.flops / flops_per_s, self.bytes / bytes_per_s)


class _Open:
    """A part that runs."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.read: dict[int, dict[tuple[int, int], int]] = {}
        self.size: dict[int, int] = {}
        self.written = 0


@contextmanager
def counting() -> Iterator[dict[str, Counted]]:
    """Count what runs inside, part by part in the order in which they run first; it takes far longer than otherwise."""
    counter = Counter()
    with counter, listening(counter):
        yield counter.parts
    counter.close(counter.open[0])


class Counter(TorchDispatchMode):
    """Counts what runs inside; see `counting`.

    Attributes:
        parts: Name -> what was counted.
        open: The parts that run, the innermost last.
    """

    def __init__(self) -> None:
        super().__init__()
        self.parts: dict[str, Counted] = {}
        self.open = [_Open(REST)]

    def enter(self, name: str) -> None:
        """A part begins."""
        self.open.append(_Open(name))
        self.parts.setdefault(name, Counted()).calls += 1

    def leave(self) -> None:
        """The innermost part ends."""
        self.close(self.open.pop())

    def close(self, part: _Open) -> None:
        """Add up what a part read and left behind."""
        counted = self.parts.setdefault(part.name, Counted())
        counted.bytes += part.written
        for key, views in part.read.items():
            counted.bytes += min(sum(views.values()), part.size[key])
        counted.bytes += sum(size for ref, size in part.made.values() if not ref.expired())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func._overloadpacket
        known = func in FUSED or packet in flop_registry or packet in ON_A_CPU
        if not known and func is not aten.detach.default:
            with self:
                found = func.decompose(*args, **kwargs)
            if found is not NotImplemented:
                return found
        out = func(*args, **kwargs)
        part = self.open[-1]
        counted = self.parts.setdefault(part.name, Counted())
        formula = FUSED.get(func) or ON_A_CPU.get(packet) or flop_registry.get(packet)
        if formula is not None:
            counted.flops += formula(*args, **kwargs, out_val=out)
        self._follow(part, func, args, kwargs, out)
        return out

    def _follow(self, part: _Open, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Note what an operation reads and writes."""
        inputs = [t for t in tree_leaves([args, kwargs]) if isinstance(t, Tensor)]
        outputs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        owned = {_key(t) for t in inputs}
        changes = func._schema.is_mutable
        if not changes and outputs and all(_key(t) in owned for t in outputs):
            return  # a view
        for tensor in outputs:
            key = _key(tensor)
            if key not in owned:
                storage = tensor.untyped_storage()
                part.made[key] = (StorageWeakRef(storage), storage.nbytes())
        if changes:
            for number, argument in enumerate(func._schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    value = args[number] if number < len(args) else kwargs.get(argument.name)
                    part.written += sum(_bytes(t) for t in tree_leaves(value) if self._from_outside(part, t))
        gathers = func._overloadpacket in GATHERS
        for tensor in inputs:
            if self._from_outside(part, tensor):
                key, size = _key(tensor), _bytes(tensor)
                if gathers and outputs:
                    size = min(size, _bytes(outputs[0]))
                part.read.setdefault(key, {})[(int(tensor.storage_offset()), int(tensor.numel()))] = size
                part.size[key] = tensor.untyped_storage().nbytes()

    @staticmethod
    def _from_outside(part: _Open, tensor: Any) -> bool:
        if not isinstance(tensor, Tensor) or not tensor.numel():
            return False
        found = part.made.get(_key(tensor))
        return found is None or found[0].expired()


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _bytes(tensor: Tensor) -> int:
    return int(tensor.numel() * tensor.element_size())
