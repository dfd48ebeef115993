"""The Brusselator in DaCe: whole arrays; and scalar loops, mutated.

Where one operation reads an array twice, as u * u * v, reverse mode fails in an assertion, so here it is u**2 * v.
"""

import dace
import numpy as np

from problems import Implementation
from problems.brusselator import FORCING, T_FORCING


def rhs(theta, data, size):
    c, force = float((size.N - 1) ** 2), FORCING if size.t >= T_FORCING else 0.0

    @dace.program
    def program(u, A, B, alpha, disc, v, S):
        U2V = u[0] ** 2 * u[1]
        w = np.roll(u, 1, 1) + np.roll(u, -1, 1) + np.roll(u, 1, 2) + np.roll(u, -1, 2) - 4 * u
        f = B[0] + U2V - (A[0] + 1) * u[0] + alpha[0] * c * w[0] + force * disc
        g = A[0] * u[0] - U2V + alpha[0] * c * w[1]
        S[0] = np.sum(v[0] * f) + np.sum(v[1] * g)

    return program


def rhs_loops(theta, data, size):
    N, c, force = size.N, float((size.N - 1) ** 2), FORCING if size.t >= T_FORCING else 0.0

    @dace.program
    def program(u, A, B, alpha, disc, v, S):
        du = np.empty_like(u)
        for i in range(N):
            for j in range(N):
                U2V = u[0, i, j] * u[0, i, j] * u[1, i, j]
                lapU = (
                    u[0, (i + N - 1) % N, j]
                    + u[0, (i + 1) % N, j]
                    + u[0, i, (j + N - 1) % N]
                    + u[0, i, (j + 1) % N]
                    - 4 * u[0, i, j]
                )
                lapV = (
                    u[1, (i + N - 1) % N, j]
                    + u[1, (i + 1) % N, j]
                    + u[1, i, (j + N - 1) % N]
                    + u[1, i, (j + 1) % N]
                    - 4 * u[1, i, j]
                )
                du[0, i, j] = B[0] + U2V - (A[0] + 1) * u[0, i, j] + alpha[0] * c * lapU + force * disc[i, j]
                du[1, i, j] = A[0] * u[0, i, j] - U2V + alpha[0] * c * lapV
        S[0] = np.sum(v * du)

    return program


IMPLEMENTATION = {
    "rhs": {"array": Implementation(rhs), "loops": Implementation(rhs_loops)},
}
