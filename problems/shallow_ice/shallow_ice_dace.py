"""The valley glacier in DaCe: whole arrays; and scalar loops, mutated."""

import dace
import numpy as np

from problems import Implementation
from problems.shallow_ice import BOX, EPS, RHO_G


def rhs(theta, data, size):
    dx, A0 = BOX / size.N, size.A

    @dace.program
    def program(H, lnA, B, v, S):
        Hc = np.maximum(H, 0.0)  # its derivative at 0 is that of where(H > 0, H, 0): 0
        Z = B + Hc  # the surface
        dSx = (Z[1:, :] - Z[:-1, :]) / dx  # (N-1, N): edges
        dSy = (Z[:, 1:] - Z[:, :-1]) / dx  # (N, N-1)
        gx = 0.5 * (dSx[:, 1:] + dSx[:, :-1])  # (N-1, N-1): corners
        gy = 0.5 * (dSy[1:, :] + dSy[:-1, :])
        Hb = 0.25 * (Hc[1:, 1:] + Hc[1:, :-1] + Hc[:-1, 1:] + Hc[:-1, :-1])
        D = 0.4 * RHO_G**3 * A0 * np.exp(lnA[0]) * Hb**5 * (gx**2 + gy**2 + EPS)
        cx = Hc[:, 1:-1] / dx
        cy = Hc[1:-1, :] / dx
        ex = np.maximum(-cx[:-1, :], np.minimum(cx[1:, :], dSx[:, 1:-1]))  # (N-1, N-2)
        ey = np.maximum(-cy[:, :-1], np.minimum(cy[:, 1:], dSy[1:-1, :]))  # (N-2, N-1)
        Fx = -0.5 * (D[:, 1:] + D[:, :-1]) * ex
        Fy = -0.5 * (D[1:, :] + D[:-1, :]) * ey
        dH = (Fx[:-1, :] - Fx[1:, :] + Fy[:, :-1] - Fy[:, 1:]) / dx
        S[0] = np.sum(v[1:-1, 1:-1] * dH)  # nothing moves on the boundary

    return program


def rhs_loops(theta, data, size):
    N, dx, A0 = size.N, BOX / size.N, size.A

    @dace.program
    def program(H, lnA, B, v, S):
        Hc = np.maximum(H, 0.0)  # its derivative at 0 is that of where(H > 0, H, 0): 0
        Z = B + Hc  # the surface
        D = np.zeros_like(H)
        Fx = np.zeros_like(H)
        Fy = np.zeros_like(H)
        dH = np.zeros_like(H)
        A = A0 * np.exp(lnA[0])
        for i in range(N - 1):
            for j in range(N - 1):
                gx = (Z[i + 1, j] - Z[i, j] + Z[i + 1, j + 1] - Z[i, j + 1]) / (2 * dx)
                gy = (Z[i, j + 1] - Z[i, j] + Z[i + 1, j + 1] - Z[i + 1, j]) / (2 * dx)
                Hb = 0.25 * (Hc[i, j] + Hc[i + 1, j] + Hc[i, j + 1] + Hc[i + 1, j + 1])
                D[i, j] = 0.4 * RHO_G**3 * A * (Hb * Hb * Hb * Hb * Hb) * (gx * gx + gy * gy + EPS)
        for i in range(N - 1):
            for j in range(1, N - 1):
                e = max(-Hc[i, j], min(Hc[i + 1, j], Z[i + 1, j] - Z[i, j]))
                Fx[i, j] = -(D[i, j - 1] + D[i, j]) / 2 * e / dx
        for i in range(1, N - 1):
            for j in range(N - 1):
                e = max(-Hc[i, j], min(Hc[i, j + 1], Z[i, j + 1] - Z[i, j]))
                Fy[i, j] = -(D[i - 1, j] + D[i, j]) / 2 * e / dx
        for i in range(1, N - 1):
            for j in range(1, N - 1):
                dH[i, j] = (Fx[i - 1, j] - Fx[i, j] + Fy[i, j - 1] - Fy[i, j]) / dx
        S[0] = np.sum(v * dH)

    return program


IMPLEMENTATION = {"rhs": {"array": Implementation(rhs), "loops": Implementation(rhs_loops)}}
