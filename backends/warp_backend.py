"""Warp: kernels that Warp differentiates in source; a tape of their launches is what runs backwards.

Warp has no 0-d arrays: they come as arrays of one number that remember it (`scalar`). The way back reads arrays as they are
then: one that is overwritten gives wrong gradients without a word, unless it was used linearly only. So `prepare` makes an
array for every launch whose result the way back wants.
"""

import tempfile

import numpy as np

from backends import Backend


class Warp(Backend):
    requires = ("warp-lang", "numpy", "scipy")
    devices = ("cpu", "cuda")

    def __init__(self, device):
        import warp

        warp.config.log_level = warp.LOG_WARNING  # it prints, and stdout is not its own
        self.cache = tempfile.TemporaryDirectory(prefix="warp-")  # as for all others: every process compiles
        warp.config.kernel_cache_dir = self.cache.name
        warp.init()
        if device == "cuda" and not warp.is_cuda_available():
            raise RuntimeError("this Warp sees no CUDA device")
        warp.set_device(device)
        self.warp, self.device = warp, device

    def put(self, array):
        found = self.warp.array(array, device=self.device)
        found.scalar = np.ndim(array) == 0
        return found

    def get(self, array):
        return array.numpy().reshape(() if array.scalar else array.shape)

    def wait(self, result):
        self.warp.synchronize_device()
        return result

    def where(self, array):
        return "cpu" if array.device.is_cpu else "cuda"

    def device_memory(self):
        return None  # Warp's high-water mark is that of the whole process

    def primal(self, loss):
        return lambda theta, data: scalar(loss(theta, data))

    def tape(self, loss):
        """Recorded anew in every call."""
        return self._derivative(loss)

    def compile(self, loss):
        """The tape, there and back, as a captured graph (CUDA's, or Warp's own on the CPU): no Python between launches."""
        return self._captured(self._derivative(loss, captured=True))

    def compile_primal(self, loss):
        return self._captured(self.primal(loss))

    def _derivative(self, loss, captured=False):
        def derivative(theta, data):
            gradient = leaves(theta)
            with self.warp.Tape() as tape:
                value = loss(theta, data)
            if captured and any(map(callable, tape.launches)):
                raise NotImplementedError("a function in Python is on the tape; a captured graph would leave it out")
            tape.backward(value)
            return scalar(value), gradient

        return derivative

    def _captured(self, function):
        """A graph holds addresses: other arrays are captured anew."""
        held = []

        def call(theta, data):
            arrays = [*theta.values(), *data.values()]
            if not held or any(a is not b for a, b in zip(arrays, held[0], strict=True)):
                function(theta, data)  # compiles what cannot be compiled under capture
                with self.warp.ScopedCapture(self.device) as capture:
                    out = function(theta, data)
                held[:] = arrays, capture.graph, out
            self.warp.capture_launch(held[1])
            return held[2]

        return call


def scalar(value):
    value.scalar = True
    return value


def scratch(shape, real, gradient=None):
    """Zeros for `work`, with a gradient beside them that storing into the array zeroes on the way back.

    So arrays whose gradients are not in use at once may share one.
    """
    import warp

    found = warp.zeros(shape, dtype=real, requires_grad=gradient is None)
    if gradient is not None:
        found.grad = gradient
    found.nbytes = found.size * warp.types.type_size_in_bytes(real) * (2 if gradient is None else 1)
    return found


def record(backward, arrays):
    """Puts a function of Python on the tape, where one is being recorded; `arrays` have the gradients that it touches."""
    from warp._src.context import runtime  # Warp has no public name for it

    if runtime.tape:
        runtime.tape.record_func(backward, arrays)


def leaves(theta):
    """Gradients at zero, for they are added to; allocated beside the blocks at the first call."""
    for block in theta.values():
        if not block.requires_grad:
            block.requires_grad = True
            block.grad.scalar = block.scalar
        block.grad.zero_()
    return {name: block.grad for name, block in theta.items()}


BACKEND = Warp
