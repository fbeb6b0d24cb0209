"""Models without memory: their passes are run on shapes alone, and what they would take is counted."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count


aten = torch.ops.aten
# PyTorch's registry counts no products that are added in place, and the attention of GPUs alone.
FLOPS = flop_registry | {
    aten.addmm_: flop_registry[aten.addmm],
    aten._grouped_mm: lambda a, b, *_, **__: 2 * a.shape[-2] * a.shape[-1] * b.shape[-1],
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(
        q.shape, k.shape, v.shape
    ),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(
        g.shape, q.shape, k.shape, v.shape
    ),
}


class _Counter(TorchDispatchMode):
    """Bytes of the tensors that are made within and still alive, the most there ever were, and operations.

    `FlopCounterMode` would count the operations too, but its hooks keep alive what gradient checkpointing gives free.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.flops = self.products = self.operations = 0
        self.seen: dict[int, weakref.ref] = {}
        self.guessed = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default:  # every other call, and no operation
            return args[0].device
        given = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = self._result(func, *args, **(kwargs or {}))
        self.operations += 1
        if flops := FLOPS.get(func._overloadpacket):
            self.flops += flops(*args, **(kwargs or {}), out_val=result)
            self.products += 1
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if id(storage) not in given and id(storage) not in self.seen:
                    self._add(storage)
        return result

    def _result(self, func, *args, **kwargs):
        """The result of an operation, also where PyTorch gives none without values."""
        if func is aten._grouped_mm.default:  # experts, of which PyTorch knows the shapes in bfloat16 alone
            a, b, offsets = (*args, *kwargs.values())[:3]
            groups = (len(offsets),) if a.ndim == b.ndim == 2 else ()
            return a.new_empty(*groups, a.shape[-2], b.shape[-1])
        try:
            return func(*args, **kwargs)
        except DataDependentOutputException:
            if func is not aten._local_scalar_dense.default:
                raise
            # Models ask whether all positions are text, and in a plan they are.
            self.guessed = True
            return args[0].dtype == torch.bool or 1

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()

        def free(_) -> None:
            self.live -= size
            del self.seen[key]

        self.seen[key] = weakref.ref(storage, free)
        self.live += size
        self.peak = max(self.peak, self.live)


@dataclass
class Cost:
    """What some work takes.

    Args:
        flops (`int`): Floating-point operations of matrix products and attention.
        products (`int`): How many of those there are.
        operations (`int`): How many operations of any kind.
        peak (`int`): Most bytes of tensors made within the work that were alive at once.
        kept (`int`): Bytes of them that are alive at its end.
        guessed (`bool`): Whether the work asked for the value of a tensor, for which 1 was taken.
    """

    flops: int = 0
    products: int = 0
    operations: int = 0
    peak: int = 0
    kept: int = 0
    guessed: bool = False


@contextmanager
def counted() -> Iterator[Cost]:
    """Count the enclosed work; to be entered within a `FakeTensorMode`."""
    cost = Cost()
    with _Counter() as counter:
        yield cost
    cost.flops, cost.products, cost.operations = counter.flops, counter.products, counter.operations
    cost.peak, cost.kept = counter.peak, counter.live
    cost.guessed = counter.guessed


def materialize(model: nn.Module, device: str = "cpu") -> nn.Module:
    """Put tensors where a skeleton has none, in place; to be called within a `FakeTensorMode`, whose tensors are
    fake.
    """
    known: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is None:
                    continue
                if id(tensor) not in known:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                    if isinstance(tensor, nn.Parameter):
                        fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
                    known[id(tensor)] = fake
                store[name] = known[id(tensor)]
    return model
