"""The neural ODE in DaCe: whole arrays; the states of all steps are one array, of which nothing is written twice.

Reverse mode fails where one operation reads an array twice (u * u * u, so it is u**3), and where the state is written over
in the loop, or the loss is summed up in it.
"""

import dace
import numpy as np

from problems import Implementation
from problems.neural_ode import SAVES, T


def rhs(theta, data, size):
    @dace.program
    def program(u, W1, b1, W2, b2, v, S):
        z = np.tanh(W1 @ u**3 + b1)
        du = W2 @ z + b2
        S[0] = np.sum(v * du)

    return program


def rhs_loops(theta, data, size):
    H = size.H

    @dace.program
    def program(u, W1, b1, W2, b2, v, S):
        vf = np.zeros(H + 1)
        vf[H] = v[0] * b2[0] + v[1] * b2[1]
        for j in range(H):
            z = np.tanh(W1[j, 0] * u[0] * u[0] * u[0] + W1[j, 1] * u[1] * u[1] * u[1] + b1[j])
            vf[j] = (v[0] * W2[0, j] + v[1] * W2[1, j]) * z
        S[0] = np.sum(vf)

    return program


def rk4(theta, data, size):
    m, b, steps = size.m, size.b, (SAVES - 1) * size.m
    dt = T / steps

    @dace.program
    def program(W1, b1, W2, b2, u0, target, S):
        u = np.zeros((steps + 1, b, 2))
        u[0] = u0
        for n in range(steps):
            k1 = np.tanh(u[n] ** 3 @ W1.T + b1) @ W2.T + b2
            u2 = u[n] + dt / 2 * k1
            k2 = np.tanh(u2**3 @ W1.T + b1) @ W2.T + b2
            u3 = u[n] + dt / 2 * k2
            k3 = np.tanh(u3**3 @ W1.T + b1) @ W2.T + b2
            u4 = u[n] + dt * k3
            k4 = np.tanh(u4**3 @ W1.T + b1) @ W2.T + b2
            u[n + 1] = u[n] + dt / 6 * (k1 + 2 * (k2 + k3) + k4)
        r = np.zeros((SAVES, b, 2))
        for i in range(SAVES):
            for k in range(b):
                for s in range(2):
                    r[i, k, s] = (u[m * i, k, s] - target[i, s]) ** 2
        S[0] = np.sum(r)

    return program


IMPLEMENTATION = {
    "rhs": {"array": Implementation(rhs), "loops": Implementation(rhs_loops)},
    "rk4": {"array": Implementation(rk4)},
}
