"""The neural ODE in JAX: written for one trajectory, a scan over the steps, vmap over the batch; ode by diffrax and its
adjoints, and as a scan, too. diffrax is imported where it is used, so that no other task pays for it.
"""

from math import ceil

import jax
import jax.numpy as jnp
from jax import lax

from problems import Implementation
from problems.neural_ode import SAVES, T, attempts, dopri5, first_step

BLOCK = 8  # attempts that are left out together: each by itself takes 6 us, more than half of the time at small


def f(u, W1, b1, W2, b2):
    return W2 @ jnp.tanh(W1 @ u**3 + b1) + b2


def rhs(theta, data, size):
    return data["v"] @ f(**theta)


def step(u, dt, net):
    k1 = f(u, **net)
    k2 = f(u + dt / 2 * k1, **net)
    k3 = f(u + dt / 2 * k2, **net)
    k4 = f(u + dt * k3, **net)
    return u + dt / 6 * (k1 + 2 * (k2 + k3) + k4)


def misfit(saved, data):
    """saved (b, 29, 2): without t = 0."""
    u0, target = data["u0"], data["target"]
    return jnp.sum((u0 - target[0]) ** 2) + jnp.sum((saved - target[1:]) ** 2)


def rk4(theta, data, size):
    dt = T / (SAVES - 1) / size.m

    def each(u, _):
        u = step(u, dt, theta)
        return u, u

    def trajectory(u0):
        _, u = jax.lax.scan(each, u0, length=(SAVES - 1) * size.m)  # two nested scans take 1.1 times as long at m = 4
        return u[size.m - 1 :: size.m]

    return misfit(jax.vmap(trajectory)(data["u0"]), data)


def rk4_checkpoint(theta, data, size):
    """The reverse pass keeps the states at the save times, and takes the m steps between two of them again."""
    dt = T / (SAVES - 1) / size.m

    @jax.checkpoint
    def interval(u, _):
        u, _ = jax.lax.scan(lambda u, _: (step(u, dt, theta), None), u, length=size.m)
        return u, u

    def trajectory(u0):
        return jax.lax.scan(interval, u0, length=SAVES - 1)[1]

    return misfit(jax.vmap(trajectory)(data["u0"]), data)


# ode: each member of the batch takes its own steps


def solve(theta, data, size, adjoint="RecursiveCheckpointAdjoint", **options):
    """diffrax's solution (Kidger, arXiv 2202.02435), saved without t = 0, and the adjoint of that name."""
    import diffrax

    term = diffrax.ODETerm(lambda t, u, net: f(u, **net))
    controller = diffrax.PIDController(rtol=size.rtol, atol=size.atol)
    return jax.vmap(
        lambda u0: diffrax.diffeqsolve(
            term,
            diffrax.Dopri5(),
            t0=0.0,
            t1=T,
            dt0=None,
            y0=u0,
            args=theta,
            saveat=diffrax.SaveAt(ts=jnp.linspace(0, T, SAVES)[1:]),
            stepsize_controller=controller,
            adjoint=getattr(diffrax, adjoint)(**options),
        )
    )(data["u0"])


def ode(theta, data, size, **adjoint):
    return misfit(solve(theta, data, size, **adjoint).ys, data)


def ode_forward(theta, data, size):
    return ode(theta, data, size, adjoint="ForwardMode")


def ode_checkpoint(theta, data, size):
    """Four states are kept, of 16 steps at small; by itself diffrax keeps up to 89, here all."""
    return ode(theta, data, size, checkpoints=4)


def ode_direct(theta, data, size):
    return ode(theta, data, size, adjoint="DirectAdjoint")


def ode_backsolve(theta, data, size):
    """What the weights have of the adjoint is a quadrature, and needs no error control (Kidger et al., arXiv 2009.09457)."""
    from diffrax import Dopri5, PIDController, adjoint_rms_seminorm

    controller = PIDController(rtol=size.rtol, atol=size.atol, norm=adjoint_rms_seminorm)
    return ode(theta, data, size, adjoint="BacksolveAdjoint", solver=Dopri5(), stepsize_controller=controller)


def ode_stats(theta, data, size):
    """Over all members. diffrax finds its first step by two right-hand sides more."""
    stats = solve(theta, data, size).stats
    steps, rejected = stats["num_accepted_steps"].sum(), stats["num_rejected_steps"].sum()
    return {"steps": steps, "rejected": rejected, "rhs_calls": 6 * (steps + rejected) + 3 * size.b}


def courses(theta, data, size):
    """Dormand and Prince's pair in a scan as long as any course of steps may be, of which those past the end do nothing. How
    long a step is, and whether it is taken, is not differentiated. Of each member: whether it came to the end, of each attempt
    1 where it was taken, -1 where it was refused, and the solution at the save times (t = 0 is not among them)."""
    A, error, P = (x.tolist() for x in dopri5())  # plain numbers are fused into what they meet

    def trajectory(u0):
        times = jnp.linspace(0, T, SAVES, dtype=u0.dtype)[1:]

        def attempt(carry):
            t, h, u, k0 = carry
            dt = jnp.minimum(h, T - t)
            k = [k0]
            for s in range(1, 7):
                x = u + dt * sum(A[s][j] * k[j] for j in range(s))
                k.append(f(x, **theta))
            off = dt * sum(error[j] * k[j] for j in range(7))
            off = off / (size.atol + size.rtol * jnp.maximum(jnp.abs(u), jnp.abs(x)))
            off = jnp.sqrt(jnp.mean(lax.stop_gradient(off) ** 2))
            taken = off <= 1
            end = jnp.where(taken, jnp.where(h >= T - t, T, t + dt), t)
            h = dt * jnp.where(off < 1e3, jnp.minimum(10, 0.9 * jnp.maximum(off, 1e-6) ** -0.2), 0.2)
            return (end, h, jnp.where(taken, x, u), jnp.where(taken, k[6], k0)), (
                t,
                end,
                dt,
                jnp.where(taken, 1, -1),
                u,
                jnp.stack(k),
            )

        def rest(carry):
            t, h, u, k0 = carry
            return carry, (t, t, h, jnp.array(0), u, jnp.zeros((7, 2), u.dtype))

        def step(carry, _):
            return lax.cond(carry[0] < T, attempt, rest, carry)

        def several(carry, _):
            return lax.cond(carry[0] < T, take, leave, carry)

        def take(carry):
            return lax.scan(step, carry, length=BLOCK)

        def leave(carry):
            return carry, jax.tree.map(lambda x: jnp.broadcast_to(x, (BLOCK, *x.shape)), rest(carry)[1])

        start = jnp.zeros((), u0.dtype), jnp.asarray(first_step(size), u0.dtype), u0, f(u0, **theta)
        (t, *_), out = lax.scan(several, start, length=ceil(attempts(size) / BLOCK))
        begins, ends, dts, outcomes, u, k = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), out)
        n = jnp.searchsorted(ends, times)  # the first step that ends there or later
        x = (times - begins[n]) / dts[n]
        w = dts[n, None] * (x[:, None] ** jnp.arange(1, 5) @ jnp.asarray(P, u0.dtype).T)
        return t >= T, outcomes, u[n] + jnp.einsum("ij,ijs->is", w, k[n])

    return lax.map(trajectory, data["u0"])  # vmap would attempt every step of all


def ode_scan(theta, data, size):
    done, _, saved = courses(theta, data, size)
    return jnp.where(jnp.all(done), misfit(saved, data), jnp.nan)


def ode_scan_stats(theta, data, size):
    _, outcomes, _ = courses(theta, data, size)
    steps, rejected = (outcomes == 1).sum(), (outcomes == -1).sum()
    return {"steps": steps, "rejected": rejected, "rhs_calls": 6 * (steps + rejected) + size.b}


IMPLEMENTATION = {
    "rhs": {"array": Implementation(rhs)},
    "rk4": {"array": Implementation(rk4, strategies={"checkpoint": rk4_checkpoint})},
    "ode": {
        "diffrax-dopri5": Implementation(
            ode,
            stats=ode_stats,
            strategies={"forward": ode_forward, "checkpoint": ode_checkpoint, "backsolve": ode_backsolve},
        ),
        "diffrax-direct": Implementation(ode_direct, stats=ode_stats),
        "array": Implementation(ode_scan, stats=ode_scan_stats),
    },
}
