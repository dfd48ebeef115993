"""JAX: function transformations on traced array code, compiled by XLA."""

from backends import Backend


class Jax(Backend):
    requires = ("jax", "jaxlib", "diffrax", "equinox", "lineax", "optimistix", "numpy", "scipy")
    devices = ("cpu", "cuda")
    all_cores = True
    namespace = {"numpy": "jax.numpy", "scipy.fft": "jax.numpy.fft"}

    @staticmethod
    def environ(threads):
        flags = "" if threads > 1 else "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
        return {
            "JAX_ENABLE_X64": "1",
            "JAX_ENABLE_COMPILATION_CACHE": "0",
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            "XLA_FLAGS": flags,
            # Threads of XLA's pool, on as many cores as the worker may have. With one, pure_callback waits for ever: it
            # stands on that thread and asks JAX for its arguments, which are copied there once they are large.
            "NPROC": str(max(threads, 2)),
        }

    def __init__(self, device):
        import jax
        import jax.flatten_util

        self.jax = jax
        self.device = jax.devices(device)[0]

    def put(self, array):
        return self.jax.device_put(array, self.device)

    def get(self, array):
        return self.jax.device_get(array)

    def wait(self, result):
        return self.jax.block_until_ready(result)

    def where(self, array):
        (device,) = array.devices()
        return {"gpu": "cuda"}.get(device.platform, device.platform)

    def device_memory(self):
        stats = self.device.memory_stats()
        return stats and stats.get("peak_bytes_in_use")

    def primal(self, loss):
        return self.jax.jit(loss)

    def reverse(self, loss):
        return self.jax.jit(self.jax.value_and_grad(loss))

    def forward(self, loss):
        """jacfwd in batches of 64 tangents: its memory does not grow with theta, and they stay in cache (3x at 2,051)."""
        jax = self.jax

        def derivative(theta, data):
            x, unravel = jax.flatten_util.ravel_pytree(theta)

            def entry(k):
                return jax.jvp(lambda x: loss(unravel(x), data), (x,), (jax.numpy.zeros_like(x).at[k].set(1),))

            value, gradient = jax.lax.map(entry, jax.numpy.arange(x.size), batch_size=min(64, x.size))
            return value[0], unravel(gradient)

        return jax.jit(derivative)

    def checkpoint(self, loss):
        return self.jax.jit(self.jax.value_and_grad(self.jax.checkpoint(loss)))

    def checkpoint_given(self, loss):
        return self.reverse(loss)

    def custom_rule(self, loss):
        return self.reverse(loss)

    def backsolve(self, loss):
        """Of a solver that brings this adjoint, as the rule by which JAX differentiates it."""
        return self.reverse(loss)

    def implicit(self, loss):
        return self.reverse(loss)

    def implicit_primal(self, loss):
        """Of the loss by the rule, which is what is differentiated."""
        return self.primal(loss)


BACKEND = Jax
