"""The Brusselator in SciPy: ode by solve_ivp with sparse Jacobians, and by it the adjoint equation on the dense solution.

From each sample back to the one before, l' = -f'(u)^T l; the gradient is the integral of <l, df/d(A, B, alpha)>. States and
cotangents are vectors, U before V.
"""

import numpy as np
from scipy.integrate import solve_ivp
from scipy.sparse import csc_array, diags_array, eye_array, hstack, vstack

from backends.scipy_backend import gauss
from problems import Implementation
from problems.brusselator import FORCING, lap_matrix, pieces, reaction_diagonals, sparse, stiff


class Equation:
    """u' = f(u; A, B, alpha), and its derivatives at u."""

    def __init__(self, theta, data, size):
        self.A, self.B, *alpha = (block.ravel() for block in theta.values())
        self.alpha, self.L, self.S = np.concatenate(alpha), lap_matrix(size.N).tocsr(), sparse(size.N)
        self.diffusion = self.alpha[self.S.indices] * self.S.lap

    def slope(self, t, u, force):
        U, V = u.reshape(2, -1)
        flow = self.A * U - U * U * V
        return np.concatenate([self.B - U - flow + force, flow]) + self.alpha * (self.L @ u)

    def jacobian(self, t, u, force):
        return self.S.matrix(self.diffusion + reaction_diagonals(u, self.A)[self.S.place])

    def vjp(self, u, l):
        """f'(u)^T l"""
        (U, V), (p, q) = u.reshape(2, -1), l.reshape(2, -1)
        d = p - q
        return np.concatenate([(2 * U * V - self.A) * d - p, U * U * d]) + self.L @ (self.alpha * l)

    def by_parameters(self, u, l):
        """<l, df/d(A, B, alpha)>"""
        n = len(u) // 2
        return np.concatenate([u[:n] * (l[n:] - l[:n]), l[:n], l * (self.L @ u)])


def solve(slope, t, y, jacobian, size, given):
    options = {"rtol": size.rtol, "atol": size.atol, "jac": jacobian, "args": (given,)}
    done = solve_ivp(slope, t, y, "BDF", dense_output=True, **options)
    if not done.success:
        raise stiff()
    return done


def course(equation, data, size):
    """(the solution of a piece, whether its end is a sample) one after the other."""
    u = data["u0"].ravel()
    for length, forced, sampled in zip(*pieces(size), strict=True):
        force = FORCING * forced * data["disc"].ravel()
        done = solve(equation.slope, (0, length), u, equation.jacobian, size, force)
        u = done.y[:, -1]
        yield done, sampled


def misfit(u):
    return np.sum((1 - u) ** 2) / 2


def ode(theta, data, size):
    solutions = course(Equation(theta, data, size), data, size)
    return misfit(data["u0"]) + sum(misfit(done.y[:, -1]) for done, sampled in solutions if sampled)


def adjoint(theta, data, size, back):
    """The loss and its gradient, where back(equation, piece, l, size) goes through a piece and returns l and the integral."""
    equation = Equation(theta, data, size)
    solutions = [*course(equation, data, size)]
    loss, l, gradient = misfit(data["u0"]), np.zeros(data["u0"].size), 0
    for done, sampled in solutions[::-1]:
        if sampled:
            loss += misfit(done.y[:, -1])
            l = l + done.y[:, -1] - 1
        l, integral = back(equation, done, l, size)
        gradient = gradient + integral
    return loss, {name: part.reshape(size.N, size.N) for name, part in zip(theta, np.split(gradient, 4), strict=True)}


def quadrature(equation, piece, l, size):
    """l alone is integrated, then the gradient, by three of Gauss's nodes in each of its steps."""

    def slope(t, l, u):
        return -equation.vjp(u(t), l)

    def jacobian(t, l, u):
        return -equation.jacobian(t, u(t), 0).T

    done = solve(slope, (piece.t[-1], 0), l, jacobian, size, piece.sol)
    t, weights = gauss(done.t)
    return done.y[:, -1], equation.by_parameters(piece.sol(t), done.sol(t)) @ weights


def interpolating(equation, piece, l, size):
    """The gradient is integrated beside l, and its error controlled."""
    n = l.size

    def slope(t, y, u):
        w, l = u(t), y[:n]
        return -np.concatenate([equation.vjp(w, l), equation.by_parameters(w, l)])

    def jacobian(t, y, u):
        w = u(t)
        U, one, zero = diags_array(w[: n // 2]), eye_array(n // 2), csc_array((n // 2, n // 2))
        rows = equation.jacobian(t, w, 0).T, hstack([-U, U]), hstack([one, zero]), diags_array(equation.L @ w)
        return -hstack([vstack(rows), csc_array((3 * n, 2 * n))], "csc")

    y = solve(slope, (piece.t[-1], 0), np.append(l, np.zeros(2 * n)), jacobian, size, piece.sol).y[:, -1]
    return y[:n], y[n:]


def ode_quadrature(theta, data, size):
    return adjoint(theta, data, size, quadrature)


def ode_interpolating(theta, data, size):
    return adjoint(theta, data, size, interpolating)


def ode_stats(theta, data, size):
    """Of the primal. Of its refused steps SciPy says nothing."""
    solutions = [done for done, _ in course(Equation(theta, data, size), data, size)]
    steps = sum(done.t.size - 1 for done in solutions)
    counts = {"rhs_calls": "nfev", "jacobians": "njev", "factorisations": "nlu"}
    return {"steps": steps} | {name: sum(done[key] for done in solutions) for name, key in counts.items()}


IMPLEMENTATION = {
    "ode": {
        "bdf": Implementation(
            ode, stats=ode_stats, strategies={"quadrature": ode_quadrature, "interpolating": ode_interpolating}
        )
    }
}
