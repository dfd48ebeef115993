"""The neural ODE in SciPy: solve_ivp's pair of Dormand and Prince, and by it the adjoint equation or the sensitivities.

The adjoint goes back from each save time to the one before, l' = -f'(u)^T l, on the dense solution; the gradient is the
integral of <l, df/dtheta>. The batch takes steps together.
"""

import numpy as np
from scipy.integrate import solve_ivp

from backends.scipy_backend import gauss
from problems import Implementation
from problems.neural_ode import SAVES, T, f, too_small

TIMES = np.linspace(0, T, SAVES)


def solve(slope, t, y, size, *given, **options):
    done = solve_ivp(slope, t, y.ravel(), "RK45", args=given, rtol=size.rtol, atol=size.atol, **options)
    if not done.success:
        raise too_small()
    return done


def forward(theta, data, size, **options):
    """The solution, and u at all save times, (30, b, 2)."""
    shape = data["u0"].shape

    def slope(t, u):
        return f(u.reshape(shape), **theta).ravel()

    done = solve(slope, (0, T), data["u0"], size, t_eval=TIMES, **options)
    return done, done.y.T.reshape(SAVES, *shape)


def misfit(u, data):
    return np.sum((u - data["target"][:, None]) ** 2)


def ode(theta, data, size):
    return misfit(forward(theta, data, size)[1], data)


# around the solver: the adjoint


def back(u, l, W1, b1, W2, b2):
    """<l, df/du> (..., 2), and what <l, df/dtheta> is made of: the cotangent of the hidden layer, z and u^3."""
    c = u**3
    z = np.tanh(c @ W1.T + b1)
    ab = (l @ W2) * (1 - z * z)
    return 3 * u * u * (ab @ W1), ab, z, c


def by_weights(l, ab, z, c):
    """<l, df/dtheta>, summed over all rows."""
    return np.concatenate([(ab.T @ c).ravel(), ab.sum(0), (l.T @ z).ravel(), l.sum(0)])


def adjoint(theta, data, size, piece):
    """The loss and its gradient, where piece(u, t, l) goes from a save time to the one before, and returns l and the integral."""
    done, u = forward(theta, data, size, dense_output=True)
    l, gradient = np.zeros(data["u0"].size), 0
    for i in range(SAVES - 1, 0, -1):
        l = l + 2 * (u[i] - data["target"][i]).ravel()
        l, integral = piece(done.sol, (TIMES[i], TIMES[i - 1]), l)
        gradient = gradient + integral
    return misfit(u, data), blocks(gradient, theta)


def blocks(gradient, theta):
    parts = np.split(gradient, np.cumsum([block.size for block in theta.values()])[:-1])
    return {name: part.reshape(theta[name].shape) for name, part in zip(theta, parts, strict=True)}


def ode_quadrature(theta, data, size):
    """l alone is integrated, then the gradient, by three of Gauss's nodes in each of its steps."""

    def slope(t, l, u):
        return -back(u(t).reshape(-1, 2), l.reshape(-1, 2), **theta)[0].ravel()

    def piece(u, t, l):
        done = solve(slope, t, l, size, u, dense_output=True)
        nodes, weights = gauss(done.t)
        w, l = u(nodes).T.reshape(-1, 2), (done.sol(nodes) * weights).T.reshape(-1, 2)
        return done.y[:, -1], by_weights(l, *back(w, l, **theta)[1:])

    return adjoint(theta, data, size, piece)


def ode_interpolating(theta, data, size):
    """The gradient is integrated beside l, and its error controlled."""
    n = data["u0"].size

    def slope(t, y, u):
        l = y[:n].reshape(-1, 2)
        ub, *parts = back(u(t).reshape(-1, 2), l, **theta)
        return -np.concatenate([ub.ravel(), by_weights(l, *parts)])

    def piece(u, t, l):
        start = np.append(l, np.zeros(sum(block.size for block in theta.values())))
        y = solve(slope, t, start, size, u).y[:, -1]
        return y[:n], y[n:]

    return adjoint(theta, data, size, piece)


# beside the solver: S' = df/du S + df/dtheta, a row an entry of theta


def ode_sensitivity(theta, data, size):
    W1, b1, W2, _ = theta.values()
    (b, _), H = data["u0"].shape, size.H
    P = sum(block.size for block in theta.values())

    def slope(t, y):
        u, S = y[: 2 * b].reshape(b, 2), y[2 * b :].reshape(P, b, 2)
        c = u**3
        z = np.tanh(c @ W1.T + b1)
        W2d = (W2 * (1 - z * z)[:, None]).swapaxes(1, 2)  # (b, H, 2) of the hidden layer before tanh
        of_u = np.einsum("bhi,hj->bij", W2d, W1) * (3 * u * u)[:, None]
        dS = np.einsum("pbj,bij->pbi", S, of_u)
        of_W1, of_b1, of_W2, of_b2 = np.split(dS, np.cumsum([2 * H, H, 2 * H]))
        of_W1.reshape(H, 2, b, 2)[:] += np.einsum("bhi,bj->hjbi", W2d, c)
        of_b1 += W2d.swapaxes(0, 1)
        for i in range(2):
            of_W2.reshape(2, H, b, 2)[i, :, :, i] += z.T
            of_b2[i, :, i] += 1
        return np.concatenate([f(u, **theta).ravel(), dS.ravel()])

    start = np.append(data["u0"], np.zeros(P * 2 * b))
    y = solve(slope, (0, T), start, size, t_eval=TIMES).y.T
    u, S = y[:, : 2 * b].reshape(SAVES, b, 2), y[:, 2 * b :].reshape(SAVES, P, b, 2)
    return misfit(u, data), blocks(2 * np.einsum("tbi,tpbi->p", u - data["target"][:, None], S), theta)


def ode_stats(theta, data, size):
    """Of the primal. Of its refused steps SciPy says nothing."""
    done, _ = forward(theta, data, size, dense_output=True)
    return {"steps": len(done.sol.interpolants), "rhs_calls": done.nfev}


IMPLEMENTATION = {
    "ode": {
        "rk45": Implementation(
            ode,
            stats=ode_stats,
            strategies={
                "quadrature": ode_quadrature,
                "interpolating": ode_interpolating,
                "sensitivity": ode_sensitivity,
            },
        )
    }
}
