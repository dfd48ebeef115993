"""PyTorch: eager arrays on a tape that is recorded anew in every call."""

from backends import Backend


class Torch(Backend):
    requires = ("torch", "numpy", "scipy")
    devices = ("cpu", "cuda")

    @staticmethod
    def environ(threads):
        return {"PYTORCH_CUDA_ALLOC_CONF": "", "CUDA_MODULE_LOADING": "LAZY"}

    def __init__(self, device):
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


BACKEND = Torch
