"""JAX: function transformations on traced array code, compiled by XLA."""

from backends import Backend


class Jax(Backend):
    requires = ("jax", "jaxlib", "numpy", "scipy")
    devices = ("cpu", "cuda")

    @staticmethod
    def environ(threads):
        flags = "" if threads > 1 else "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
        return {
            "JAX_ENABLE_X64": "1",
            "JAX_ENABLE_COMPILATION_CACHE": "0",
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            "XLA_FLAGS": flags,
        }

    def __init__(self, device):
        import jax

        self.jax = jax
        self.device = jax.devices(device)[0]

    def put(self, array):
        return self.jax.device_put(array, self.device)

    def get(self, array):
        return self.jax.device_get(array)

    def wait(self, result):
        return self.jax.block_until_ready(result)

    def device_memory(self):
        stats = self.device.memory_stats()
        return stats and stats.get("peak_bytes_in_use")

    def primal(self, loss):
        return self.jax.jit(loss)

    def reverse(self, loss):
        return self.jax.jit(self.jax.value_and_grad(loss))

    def forward(self, loss):
        return self.jax.jit(lambda theta, data: (loss(theta, data), self.jax.jacfwd(loss)(theta, data)))

    def checkpoint(self, loss):
        return self.jax.jit(self.jax.value_and_grad(self.jax.checkpoint(loss)))


BACKEND = Jax
