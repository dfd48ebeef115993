"""PyTorch: eager arrays on a tape that is recorded anew in every call, or a graph captured once and compiled."""

import os
from functools import cache

from backends import Backend


def checkpointed(part):
    """Stores the inputs of this part of a loss alone, and runs it again in the reverse pass."""
    from torch.utils.checkpoint import checkpoint

    return lambda *inputs: checkpoint(part, *inputs, use_reentrant=False, preserve_rng_state=False)


@cache
def compiled(part):
    """A step of a loss, compiled for one shape on first use; the loop around it stays in Python."""
    import torch

    return torch.compile(part, dynamic=False)


class Torch(Backend):
    requires = ("torch", "torchdiffeq", "numpy", "scipy")
    devices = ("cpu", "cuda")
    all_cores = True
    namespace = {"numpy": "torch", "scipy.fft": "torch.fft"}
    programs = {"compile": ("g++", "c++", "clang++")}

    @staticmethod
    def environ(threads):
        return {
            "PYTORCH_CUDA_ALLOC_CONF": "",
            "CUDA_MODULE_LOADING": "LAZY",
            "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
        }

    def __init__(self, device):
        os.environ.pop("TORCHINDUCTOR_CACHE_DIR", None)  # a user's own; without it, the worker's temporary folder
        import torch

        self.torch = torch
        self.device = torch.device(device)
        if device == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("this PyTorch sees no CUDA device")

    def put(self, array):
        return self.torch.as_tensor(array, device=self.device)

    def get(self, array):
        return array.detach().cpu().numpy()

    def wait(self, result):
        if self.device.type == "cuda":
            self.torch.cuda.synchronize()
        return result

    def where(self, array):
        return array.device.type

    def device_memory(self):
        if self.device.type == "cpu":
            return None
        peak = self.torch.cuda.max_memory_allocated()
        self.torch.cuda.reset_peak_memory_stats()
        return peak

    def primal(self, loss):
        return self.torch.no_grad()(loss)

    def reverse(self, loss):
        def derivative(theta, data):
            leaves = {name: block.detach().requires_grad_() for name, block in theta.items()}
            value = loss(leaves, data)
            return value.detach(), dict(
                zip(leaves, self.torch.autograd.grad(value, tuple(leaves.values())), strict=True)
            )

        return derivative

    def checkpoint(self, loss):
        """Of the whole loss, where the implementation gave nothing better."""
        return self.reverse(checkpointed(loss))

    def checkpoint_given(self, loss):
        return self.reverse(loss)

    def compile(self, loss):
        """Loss and gradient as one graph, faster than autograd.grad around a compiled loss. It would unroll a loop: a loss
        that has one compiles its own step."""
        self.torch._dynamo.config.trace_autograd_ops = True
        return self.torch.compile(self.reverse(loss), dynamic=False)

    def compile_given(self, loss):
        return self.reverse(loss)

    def compile_primal(self, loss):
        return self.torch.compile(self.primal(loss), dynamic=False)

    def custom_rule(self, loss):
        return self.reverse(loss)

    def func(self, loss):
        grad_and_value = self.torch.func.grad_and_value(loss)

        def derivative(theta, data):
            gradient, value = grad_and_value(theta, data)
            return value, gradient

        return derivative

    def backsolve(self, loss):
        """Of a solver that brings this adjoint, as a function of its own on the tape."""
        return self.reverse(loss)

    def implicit(self, loss):
        return self.reverse(loss)

    def implicit_primal(self, loss):
        """Of the loss by the rule, which is what is differentiated."""
        return self.primal(loss)

    def forward(self, loss):
        """jvp under vmap, 64 tangents at once; torch.func.jacfwd takes all of them at once, n^2 numbers."""
        torch = self.torch

        def derivative(theta, data):
            x = torch.cat([block.ravel() for block in theta.values()])
            entries = torch.arange(len(x), device=x.device)

            def unravel(x):
                parts = x.split([block.numel() for block in theta.values()])
                return {name: part.view_as(theta[name]) for name, part in zip(theta, parts, strict=True)}

            def entry(k):
                return torch.func.jvp(lambda x: loss(unravel(x), data), (x,), ((entries == k).to(x.dtype),))

            value, gradient = torch.vmap(entry, chunk_size=64)(entries)
            return value[0], unravel(gradient)

        return derivative


BACKEND = Torch
