"""Whether a gradient that arrives in a backward may be written over: proof that nobody else can see it.

A gradient's memory is reachable through its tensor or its storage, and each of them through C++ handles or its Python
object. These four counts of holders are compared with those of a control: a zero that the engine itself makes for an
unused output of the same node and passes in the same call, through the same frames. Whatever the engine, the
interpreter, a debugger or a tracer add, they add to both, so equal counts mean that the gradient has no holder of its
own. torch's engine trusts the two C++ counts in the same way when it accumulates gradients in place.

A process starts with a check that deliberate holders are seen; where they are not, or where this torch does not count
them, nothing is ever written over.
"""

from sys import getrefcount
from weakref import getweakrefcount

import torch


def unshared(grad, control):
    """True when `grad` is plain, dense, writable memory with no more holders than `control`, of the same backward."""
    if type(grad) is not torch.Tensor or type(control) is not torch.Tensor or grad.requires_grad:
        return False
    if getrefcount(grad) != getrefcount(control) or grad._use_count() != control._use_count():
        return False
    memory, control_memory = grad.untyped_storage(), control.untyped_storage()
    return (
        getrefcount(memory) == getrefcount(control_memory)
        and torch._C._storage_Use_Count(memory._cdata) == torch._C._storage_Use_Count(control_memory._cdata)
        and memory.resizable()  # memory lent by numpy, dlpack or a file is not torch's to count
        and getweakrefcount(grad) == 0
        and grad.is_contiguous()
        and not grad.is_neg()
        and not grad.is_conj()
    )


class _Probe(torch.autograd.Function):
    """An identity whose backward reports what `unshared` says of the gradient that arrives."""

    @staticmethod
    def forward(ctx, x, verdicts):
        ctx.verdicts = verdicts
        control = torch.zeros((), dtype=torch.int64, device="cpu")
        ctx.mark_non_differentiable(control)
        return x.view_as(x), control

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, control):
        ctx.verdicts.append(unshared(grad, control))
        return grad, None


_seen = None


def holders_are_seen():
    """Once a process: every deliberate holder of a gradient makes `unshared` say no, and the lack of one yes."""
    global _seen
    if _seen is None:
        try:
            held, free = _verdicts()
        except AttributeError:  # a torch without one of these counts, which are not public
            held, free = [True], False
        if any(held) or free:  # otherwise some mode holds every tensor for now; ask again later
            _seen = free and not any(held)
    return bool(_seen)


def _verdicts():
    kept, verdicts = [], []
    holders = (
        lambda out: out.register_hook(lambda grad: kept.append(grad)),
        lambda out: out.register_hook(lambda grad: kept.append(grad.detach())),
        lambda out: out.register_hook(lambda grad: kept.append(grad.view(-1))),
        lambda out: out.register_hook(lambda grad: kept.append(grad.untyped_storage())),
        lambda out: out.grad_fn.register_prehook(lambda grads: kept.append(grads)),
    )
    with torch.enable_grad():
        x = torch.zeros((2, 2), device="cpu", requires_grad=True)
        for hold in holders:
            out, _ = _Probe.apply(x + 1, verdicts)
            hold(out)
            (out * 2).sum().backward()
        out, _ = _Probe.apply(x + 1, verdicts)
        torch.autograd.grad((out * 2).sum(), [out, x])
        out, _ = _Probe.apply(x + 1, verdicts)
        (out * 2).sum().backward()
    return verdicts[:-1], verdicts[-1]
