"""A valley glacier: shallow ice approximation, its fluidity a neural network of the temperature.

    H_t = div(D grad S)    S = B + H    D = 2 A (rho g)^3 / 5 H^5 |grad S|^2    (Glen's n = 3; no sliding, no snow)
    A = A_MIN + (A_MAX - A_MIN) NN((T + 25) / 26)    NN: 1-3-10-3-1, three times softplus, then sigmoid

Units: m, yr, Pa, degrees Celsius, A in 1 / (yr Pa^3); rho = 900, g = 9.81. The box is 12.8 km wide, dx = 12800 / N,
nodes are the centres of N x N cells, x along the first index. Bed B = 3200 - 0.08 x + 400 ((y - 6400) / 6400)^2, ice
H0 = max(0, 200 (1 - ((x - 5600) / 4000)^2 - ((y - 6400) / 2400)^2)).

The scheme is that of Huginn and ODINN (github.com/ODINN-SciML). With Hc = max(H, 0): slopes of S on edges, D on
corners from averaged slopes and thickness, |grad S|^2 = gx^2 + gy^2 + 1e-10. Before it multiplies the averaged D, the
slope on an edge is capped by Hc / dx upstream. Nothing moves on the boundary. Time: SSPRK3 (Shu and Osher 1988), spy
steps a year. Off the glacier H is exactly 0, where max(H, 0) has no derivative. Here it is 0: write where(H > 0, H, 0).
A cap that binds takes the whole derivative, one that does not takes none: where(e < lo, lo, e), never a clip that
halves it at a tie.

Tasks
    rhs    H_t at H0 with A = A0 exp(lnA), loss = <v, H_t> with v = gold(N^2): one vjp of the right-hand side.
    ude    the network's 83 weights from 9 temperatures: yearly snapshots of 9 glaciers against those of
           A_fake = A_MIN + (A_MAX - A_MIN) ((T + 25) / 26)^2, mean square difference.
    semi_implicit
           H0 and the fluidity A = A0 exp(lnA) of one glacier, by the mean of (H - H0)^2 after 5 years in nst steps. D is
           that of the step's start, and no slope is capped:

               (I - dt div(D grad)) S' = S inside, S' = S on the boundary, H' = max(S' - B, 0)

           It is solved for S' - S: the same, but on the boundary it is 0, so that the matrix is symmetric, and its
           rounding is that of a change of some metres, not of a surface 3 km high.

What they ask of AD: the thread's hard example, where its two worlds meet. Scratch buffers and interior slices written
in place, branches on the data and fifth powers (D spans eleven decades, A is 1e-17) in one function with a network, and
a long loop whose every stage the reverse pass wants again. The semi-implicit step adds linear algebra: it assembles a
matrix and factorises it, every time. The adjoint of its solve is one more solve with the same factors.
"""

from math import ceil, isqrt
from typing import NamedTuple

import numpy as np
from scipy.linalg import LinAlgError, get_lapack_funcs
from scipy.sparse import dia_array
from scipy.sparse.linalg import splu

from problems import Task, gold

BOX = 12800.0  # m
RHO_G = 900.0 * 9.81  # Pa / m
EPS = 1e-10  # keeps |grad S|^2 off 0
A_MIN, A_MAX = 8.5e-20, 8e-17  # 1 / (yr Pa^3)
TEMPERATURES = (0.0, -2.0, -3.0, -5.0, -10.0, -12.0, -14.0, -15.0, -20.0)  # degrees Celsius
LAYERS = (1, 3, 10, 3, 1)
YEARS = 5  # of the semi-implicit task


class Rhs(NamedTuple):
    N: int
    A: float = 4e-17


class Ude(NamedTuple):
    N: int
    years: int = 5
    spy: int = 0  # steps a year; 0: ceil(12 (N / 32)^2)


class SemiImplicit(NamedTuple):
    N: int
    nst: int  # steps in all
    A: float = 4e-17


def steps_a_year(size):
    return size.spy or ceil(12 * (size.N / 32) ** 2)


def valley(N):
    """Bed and ice, B and H0, each (N, N)."""
    x = (np.arange(N) + 0.5) * (BOX / N)
    x, y = x[:, None], x[None, :]
    B = 3200 - 0.08 * x + 400 * ((y - 6400) / 6400) ** 2
    return B, np.maximum(0, 200 * (1 - ((x - 5600) / 4000) ** 2 - ((y - 6400) / 2400) ** 2))


def rhs_inputs(size):
    B, H0 = valley(size.N)
    return {"H": H0, "lnA": np.array(0.0)}, {"B": B, "v": gold(size.N**2).reshape(size.N, size.N)}


def weights():
    """W1, b1, ..., W4, b4: 83 weights out of 2 gold(83), layer by layer, W is (out, in)."""
    theta, flat, k = {}, 2 * gold(83), 0
    for layer in range(1, len(LAYERS)):
        out, into = LAYERS[layer], LAYERS[layer - 1]
        theta[f"W{layer}"] = flat[k : k + out * into].reshape(out, into)
        theta[f"b{layer}"] = flat[k + out * into : k + out * into + out]
        k += out * into + out
    return theta


def ude_inputs(size):
    B, H0 = valley(size.N)
    T = np.array(TEMPERATURES)
    A_fake = A_MIN + (A_MAX - A_MIN) * ((T + 25) / 26) ** 2
    Href = snapshots_inplace(A_fake, B, H0, size)
    return weights(), {"B": B, "H0": H0, "Href": Href, "T": T}


def semi_implicit_inputs(size):
    B, H0 = valley(size.N)
    return {"lnA": np.array(0.0), "H0": H0}, {"B": B}


def semi_implicit_stats(theta, data, size):
    """Of the gradient in reverse mode, by hand or not."""
    return {"steps": size.nst, "factorisations": size.nst, "solves": 2 * size.nst}


# The semi-implicit step's linear solve, for implementations: Kx (N-1, N-2) and Ky (N-2, N-1) are dt D / dx^2 on edges


def cholesky(Kx, Ky):
    """Banded Cholesky factor of I - flow(Kx, Ky, .) (LAPACK's pbtrf, upper, in C order), and its box of inner nodes: one
    around the ice, for outside nothing flows, and the matrix is I."""
    flows = Kx[1:] + Kx[:-1] + Ky[:, 1:] + Ky[:, :-1]
    box = extent(flows.any(1)), extent(flows.any(0))
    rows, columns = (s.stop - s.start for s in box)
    U = np.zeros((rows, columns, columns + 1), Kx.dtype)
    U[:, :, columns] = 1 + flows[box]
    U[:, 1:, columns - 1] = -Ky[box][:, 1:]
    U[1:, :, 0] = -Kx[box][1:]
    U, info = get_lapack_funcs("pbtrf", (U,))(U.reshape(-1, columns + 1).T, overwrite_ab=True)
    if info:
        raise LinAlgError("the matrix is not positive definite")
    return U.T, box


def extent(some):
    """From the first to the last that is true, or all."""
    return slice(int(some.argmax()), len(some) - int(some[::-1].argmax()))


def substitute(factor, b):
    """The solution for one right-hand side, or for many at once, (..., N-2, N-2)."""
    U, (rows, columns) = factor
    x, inside = b.copy(), b[..., rows, columns]
    solution, _ = get_lapack_funcs("pbtrs", (U,))(U.T, inside.reshape(-1, len(U)).T)
    x[..., rows, columns] = solution.T.reshape(inside.shape)
    return x


# array: whole arrays, functional; leading axes are a batch


def avg_x(a):
    return 0.5 * (a[..., 1:, :] + a[..., :-1, :])


def avg_y(a):
    return 0.5 * (a[..., 1:] + a[..., :-1])


def diff_x(a):
    return a[..., 1:, :] - a[..., :-1, :]


def diff_y(a):
    return a[..., 1:] - a[..., :-1]


def cap(e, lo, hi):
    return np.where(e.real < lo.real, lo, np.where(e.real > hi.real, hi, e))


def diffusivity(Hc, dSx, dSy, A):
    """D on corners, (N-1, N-1)."""
    gx, gy, Hb = avg_y(dSx), avg_x(dSy), avg_x(avg_y(Hc))
    Hb2 = Hb * Hb
    return (0.4 * RHO_G**3) * A * (Hb2 * Hb2 * Hb) * (gx * gx + gy * gy + EPS)


def sia(H, B, A, dx):
    """H_t of the shallow ice approximation, (..., N, N); A is a number or (..., 1, 1)."""
    Hc = np.where(H.real > 0, H, 0)
    S = B + Hc
    dSx, dSy = diff_x(S) / dx, diff_y(S) / dx  # (N-1, N), (N, N-1): edges
    D = diffusivity(Hc, dSx, dSy, A)
    cx, cy = Hc[..., 1:-1] / dx, Hc[..., 1:-1, :] / dx
    ex = cap(dSx[..., 1:-1], -cx[..., :-1, :], cx[..., 1:, :])  # (N-1, N-2)
    ey = cap(dSy[..., 1:-1, :], -cy[..., :-1], cy[..., 1:])  # (N-2, N-1)
    Fx, Fy = -avg_y(D) * ex, -avg_x(D) * ey
    return pad(-(diff_x(Fx) + diff_y(Fy)) / dx)


def pad(a):
    """Nothing moves on the boundary."""
    return np.pad(a, [(0, 0)] * (a.ndim - 2) + [(1, 1), (1, 1)])


def rhs(theta, data, size):
    A = size.A * np.exp(theta["lnA"])
    return np.sum(data["v"] * sia(theta["H"], data["B"], A, BOX / size.N))


def softplus(z):
    return np.log1p(np.exp(z))


def fluidity(theta, T):
    """A of every temperature."""
    z = ((T + 25) / 26)[None]  # (1, temperatures)
    z = softplus(theta["W1"] @ z + theta["b1"][:, None])
    z = softplus(theta["W2"] @ z + theta["b2"][:, None])
    z = softplus(theta["W3"] @ z + theta["b3"][:, None])
    z = theta["W4"] @ z + theta["b4"][:, None]
    return A_MIN + (A_MAX - A_MIN) / (1 + np.exp(-z[0]))


def step(H, B, A, dx, dt):
    """SSPRK3."""
    H1 = H + dt * sia(H, B, A, dx)
    H2 = 0.75 * H + 0.25 * (H1 + dt * sia(H1, B, A, dx))
    return (H + 2 * (H2 + dt * sia(H2, B, A, dx))) / 3


def ude(theta, data, size):
    B, H0, Href = data["B"], data["H0"], data["Href"]
    A = fluidity(theta, data["T"])[:, None, None]
    H = np.broadcast_to(H0, Href.shape[1:])  # (temperatures, N, N)
    spy, loss = steps_a_year(size), 0.0
    for year in range(size.years):
        for _ in range(spy):
            H = step(H, B, A, BOX / size.N, 1 / spy)
        loss = loss + np.sum((H - Href[year]) ** 2)
    return loss / Href.size


def conductance(H, B, A, dx, dt):
    """dt D / dx^2 on edges, (N-1, N-2) and (N-2, N-1)."""
    S = B + H
    D = dt / dx**2 * diffusivity(H, diff_x(S) / dx, diff_y(S) / dx, A)
    return avg_y(D), avg_x(D)


def flow(Kx, Ky, S):
    """dt div(D grad S) inside, (N-2, N-2)."""
    return diff_x(Kx * diff_x(S[..., 1:-1])) + diff_y(Ky * diff_y(S[..., 1:-1, :]))


def solve(Kx, Ky, b):
    """x inside from x - flow(x) = b, x = 0 on the boundary: five diagonals, by columns, and a sparse LU."""
    Kx_up, Kx_down, Ky_up, Ky_down = Kx[:-1], Kx[1:], Ky[:, :-1].copy(), Ky[:, 1:].copy()
    main = 1 + Kx_up + Kx_down + Ky_up + Ky_down
    Ky_up[:, 0] = Ky_down[:, -1] = 0  # a row ends, and another begins
    diagonals = np.stack([main, -Ky_up, -Ky_down, -Kx_up, -Kx_down]).reshape(5, -1)
    return factorise(diagonals).solve(b.ravel()).reshape(b.shape)


def factorise(diagonals):
    """Sparse LU; dia_array drops the zeros, where no ice is. It may be complex (symmetric) under complex step."""
    n = diagonals.shape[1]
    M = dia_array((diagonals, [0, 1, -1, isqrt(n), -isqrt(n)]), (n, n)).tocsc()
    options = {"SymmetricMode": True, "Equil": False}
    return splu(M, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options=options)


def semi_implicit(theta, data, size):
    B, H0, A = data["B"], theta["H0"], size.A * np.exp(theta["lnA"])
    H = np.where(H0.real > 0, H0, 0)
    for _ in range(size.nst):
        Kx, Ky = conductance(H, B, A, BOX / size.N, YEARS / size.nst)
        H = H + pad(solve(Kx, Ky, flow(Kx, Ky, B + H)))
        H = np.where(H.real > 0, H, 0)
    return np.mean((H - H0) ** 2)


# inplace: slices and buffers mutated


class Buffers:
    """What one right-hand side scribbles on."""

    def __init__(self, N, dtype):
        self.Hc, self.S = np.empty((N, N), dtype), np.empty((N, N), dtype)
        self.dSx, self.dSy = np.empty((N - 1, N), dtype), np.empty((N, N - 1), dtype)
        self.gx, self.gy = np.empty((N - 1, N - 1), dtype), np.empty((N - 1, N - 1), dtype)
        self.D, self.Hb = np.empty((N - 1, N - 1), dtype), np.empty((N - 1, N - 1), dtype)
        self.Fx, self.Fy = np.empty((N - 1, N - 2), dtype), np.empty((N - 2, N - 1), dtype)
        self.dH, self.H, self.H1 = np.zeros((N, N), dtype), np.empty((N, N), dtype), np.empty((N, N), dtype)


def cap_inplace(e, lo, hi):
    np.copyto(e, lo, where=e.real < lo.real)
    np.copyto(e, hi, where=e.real > hi.real)


def diffusivity_inplace(w, H, B, A, dx):
    """w.D, on the way w.Hc and the slopes w.dSx, w.dSy."""
    w.Hc[:] = 0
    np.copyto(w.Hc, H, where=H.real > 0)
    np.add(B, w.Hc, out=w.S)
    np.subtract(w.S[1:], w.S[:-1], out=w.dSx)
    np.subtract(w.S[:, 1:], w.S[:, :-1], out=w.dSy)
    w.dSx /= dx
    w.dSy /= dx
    np.add(w.dSx[:, 1:], w.dSx[:, :-1], out=w.gx)
    np.add(w.dSy[1:], w.dSy[:-1], out=w.gy)
    w.gx *= 0.5
    w.gy *= 0.5
    w.gx *= w.gx
    w.gy *= w.gy
    w.gx += w.gy
    w.gx += EPS
    np.add(w.Hc[1:, 1:], w.Hc[1:, :-1], out=w.Hb)
    w.Hb += w.Hc[:-1, 1:]
    w.Hb += w.Hc[:-1, :-1]
    w.Hb *= 0.25
    np.multiply(w.Hb, w.Hb, out=w.D)
    w.D *= w.D
    w.D *= w.Hb
    w.D *= 0.4 * RHO_G**3 * A
    w.D *= w.gx


def sia_inplace(w, H, B, A, dx):
    """w.dH = H_t."""
    diffusivity_inplace(w, H, B, A, dx)
    w.Hc /= dx
    ex, ey = w.dSx[:, 1:-1], w.dSy[1:-1]
    cap_inplace(ex, -w.Hc[:-1, 1:-1], w.Hc[1:, 1:-1])
    cap_inplace(ey, -w.Hc[1:-1, :-1], w.Hc[1:-1, 1:])
    np.add(w.D[:, 1:], w.D[:, :-1], out=w.Fx)
    np.add(w.D[1:], w.D[:-1], out=w.Fy)
    w.Fx *= ex
    w.Fy *= ey
    dH = w.dH[1:-1, 1:-1]  # the boundary stays 0
    np.subtract(w.Fx[1:], w.Fx[:-1], out=dH)
    dH += w.Fy[:, 1:]
    dH -= w.Fy[:, :-1]
    dH *= 0.5 / dx


def rhs_inplace(theta, data, size):
    H, A = theta["H"], size.A * np.exp(theta["lnA"])
    w = Buffers(size.N, np.result_type(H, A))
    sia_inplace(w, H, data["B"], A, BOX / size.N)
    w.dH *= data["v"]
    return w.dH.sum()


def snapshots_inplace(A, B, H0, size):
    """H at the end of every year at every A, (years, temperatures, N, N)."""
    N, spy = size.N, steps_a_year(size)
    w = Buffers(N, np.result_type(A, H0))
    H, H1, dH, dx, dt = w.H, w.H1, w.dH, BOX / N, 1 / spy
    out = np.empty((size.years, len(A), N, N), H.dtype)
    for k in range(len(A)):
        H[:] = H0
        for year in range(size.years):
            for _ in range(spy):
                sia_inplace(w, H, B, A[k], dx)
                dH *= dt
                np.add(H, dH, out=H1)
                sia_inplace(w, H1, B, A[k], dx)
                dH *= dt
                H1 += dH
                H1 *= 0.25
                np.multiply(H, 0.75, out=w.S)
                H1 += w.S
                sia_inplace(w, H1, B, A[k], dx)
                dH *= dt
                H1 += dH
                H1 *= 2
                H += H1
                H /= 3
            out[year, k] = H
    return out


def ude_inplace(theta, data, size):
    A = fluidity(theta, data["T"])
    H = snapshots_inplace(A, data["B"], data["H0"], size)
    H -= data["Href"]
    H *= H
    return H.sum() / H.size


def system_inplace(w, diagonals, H, B, A, dx, dt):
    """The matrix of a step into its diagonals (5, N-2, N-2), the right-hand side into w.dH."""
    diffusivity_inplace(w, H, B, A, dx)
    w.D *= 0.5 * dt / dx**2
    Kx, Ky, dH = w.Fx, w.Fy, w.dH[1:-1, 1:-1]
    np.add(w.D[:, 1:], w.D[:, :-1], out=Kx)
    np.add(w.D[1:], w.D[:-1], out=Ky)
    main, *others = diagonals
    main[:] = 1
    for off, K in zip(others, (Ky[:, :-1], Ky[:, 1:], Kx[:-1], Kx[1:]), strict=True):
        main += K
        np.negative(K, out=off)
    others[0][:, 0] = 0
    others[1][:, -1] = 0
    Kx *= w.dSx[:, 1:-1]
    Ky *= w.dSy[1:-1]
    np.subtract(Kx[1:], Kx[:-1], out=dH)
    dH += Ky[:, 1:]
    dH -= Ky[:, :-1]
    dH *= dx


def semi_implicit_inplace(theta, data, size):
    B, H0, A, N = data["B"], theta["H0"], size.A * np.exp(theta["lnA"]), size.N
    w = Buffers(N, np.result_type(H0, A))
    diagonals = np.empty((5, N - 2, N - 2), w.H.dtype)
    H, inside = w.H, w.H[1:-1, 1:-1]
    H[:] = H0
    H[H.real <= 0] = 0
    for _ in range(size.nst):
        system_inplace(w, diagonals, H, B, A, BOX / N, YEARS / size.nst)
        inside += factorise(diagonals.reshape(5, -1)).solve(w.dH[1:-1, 1:-1].ravel()).reshape(inside.shape)
        H[H.real <= 0] = 0
    H -= H0
    H *= H
    return H.sum() / H.size


# loops: scalar loops, mutated


def capped(e, lo, hi):
    return lo if e.real < lo.real else hi if e.real > hi.real else e


def diffusivity_loops(S, D, H, B, A, dx):
    """D on corners, on the way S."""
    N = len(H)
    for i in range(N):
        for j in range(N):
            S[i, j] = B[i, j] + (H[i, j] if H[i, j].real > 0 else 0)
    for i in range(N - 1):
        for j in range(N - 1):
            gx = (S[i + 1, j] - S[i, j] + S[i + 1, j + 1] - S[i, j + 1]) / (2 * dx)
            gy = (S[i, j + 1] - S[i, j] + S[i + 1, j + 1] - S[i + 1, j]) / (2 * dx)
            Hb = 0.0
            for h in (H[i, j], H[i + 1, j], H[i, j + 1], H[i + 1, j + 1]):
                if h.real > 0:
                    Hb += 0.25 * h
            D[i, j] = 0.4 * RHO_G**3 * A * (Hb * Hb * Hb * Hb * Hb) * (gx * gx + gy * gy + EPS)


def sia_loops(dH, S, D, Fx, Fy, H, B, A, dx):
    """dH = H_t inside; S (N,N), D (N-1,N-1), Fx (N-1,N), Fy (N,N-1) are scratch."""
    N = len(H)
    diffusivity_loops(S, D, H, B, A, dx)
    for i in range(N - 1):
        for j in range(1, N - 1):
            lo = -H[i, j] if H[i, j].real > 0 else 0.0
            hi = H[i + 1, j] if H[i + 1, j].real > 0 else 0.0
            Fx[i, j] = -(D[i, j - 1] + D[i, j]) / 2 * capped(S[i + 1, j] - S[i, j], lo, hi) / dx
    for i in range(1, N - 1):
        for j in range(N - 1):
            lo = -H[i, j] if H[i, j].real > 0 else 0.0
            hi = H[i, j + 1] if H[i, j + 1].real > 0 else 0.0
            Fy[i, j] = -(D[i - 1, j] + D[i, j]) / 2 * capped(S[i, j + 1] - S[i, j], lo, hi) / dx
    for i in range(1, N - 1):
        for j in range(1, N - 1):
            dH[i, j] = (Fx[i - 1, j] - Fx[i, j] + Fy[i, j - 1] - Fy[i, j]) / dx


def scratch(N, dtype):
    """dH, S, D, Fx, Fy."""
    dH, S, D = np.zeros((N, N), dtype), np.zeros((N, N), dtype), np.zeros((N - 1, N - 1), dtype)
    return dH, S, D, np.zeros((N - 1, N), dtype), np.zeros((N, N - 1), dtype)


def rhs_loops(theta, data, size):
    H, A, v, N = theta["H"], size.A * np.exp(theta["lnA"]), data["v"], size.N
    w = scratch(N, (H + A).dtype)
    sia_loops(*w, H, data["B"], A, BOX / N)
    dH, loss = w[0], 0.0
    for i in range(N):
        for j in range(N):
            loss += v[i, j] * dH[i, j]
    return loss


def ude_loops(theta, data, size):
    B, H0, Href = data["B"], data["H0"], data["Href"]
    A = fluidity(theta, data["T"])
    N, spy, loss = size.N, steps_a_year(size), 0.0
    dx, dt, cells = BOX / N, 1 / spy, [(i, j) for i in range(N) for j in range(N)]
    w = scratch(N, (A[0] + H0).dtype)
    dH, H, H1 = w[0], np.empty_like(w[0]), np.empty_like(w[0])
    for k in range(len(A)):
        H[:] = H0
        for year in range(size.years):
            for _ in range(spy):
                sia_loops(*w, H, B, A[k], dx)
                for i, j in cells:
                    H1[i, j] = H[i, j] + dt * dH[i, j]
                sia_loops(*w, H1, B, A[k], dx)
                for i, j in cells:
                    H1[i, j] = 0.75 * H[i, j] + 0.25 * (H1[i, j] + dt * dH[i, j])
                sia_loops(*w, H1, B, A[k], dx)
                for i, j in cells:
                    H[i, j] = (H[i, j] + 2 * (H1[i, j] + dt * dH[i, j])) / 3
            for i, j in cells:
                d = H[i, j] - Href[year, k, i, j]
                loss += d * d
    return loss / Href.size


def system_loops(diagonals, b, S, D, H, B, A, dx, dt):
    """The matrix of a step into its diagonals (5, N-2, N-2), the right-hand side into b (N-2, N-2)."""
    N = len(H)
    diffusivity_loops(S, D, H, B, A, dx)
    for i in range(1, N - 1):
        for j in range(1, N - 1):
            west, east = D[i, j - 1] + D[i - 1, j - 1], D[i, j] + D[i - 1, j]
            north, south = D[i - 1, j - 1] + D[i - 1, j], D[i, j - 1] + D[i, j]
            k = dt / (2 * dx**2)
            diagonals[0, i - 1, j - 1] = 1 + k * (north + south + west + east)
            diagonals[1, i - 1, j - 1] = -k * west if j > 1 else 0
            diagonals[2, i - 1, j - 1] = -k * east if j < N - 2 else 0
            diagonals[3, i - 1, j - 1] = -k * north
            diagonals[4, i - 1, j - 1] = -k * south
            b[i - 1, j - 1] = k * (
                south * (S[i + 1, j] - S[i, j])
                - north * (S[i, j] - S[i - 1, j])
                + east * (S[i, j + 1] - S[i, j])
                - west * (S[i, j] - S[i, j - 1])
            )


def semi_implicit_loops(theta, data, size):
    B, H0, A, N = data["B"], theta["H0"], size.A * np.exp(theta["lnA"]), size.N
    H, S, D, _, _ = scratch(N, (H0 + A).dtype)
    diagonals, b, loss = np.empty((5, N - 2, N - 2), H.dtype), np.empty((N - 2, N - 2), H.dtype), 0.0
    for i in range(N):
        for j in range(N):
            H[i, j] = H0[i, j] if H0[i, j].real > 0 else 0
    for _ in range(size.nst):
        system_loops(diagonals, b, S, D, H, B, A, BOX / N, YEARS / size.nst)
        x = factorise(diagonals.reshape(5, -1)).solve(b.ravel())
        for i in range(1, N - 1):
            for j in range(1, N - 1):
                H[i, j] += x[(i - 1) * (N - 2) + j - 1]
                if H[i, j].real <= 0:
                    H[i, j] = 0
    for i in range(N):
        for j in range(N):
            loss += (H[i, j] - H0[i, j]) ** 2
    return loss / N**2


TASKS = {
    "rhs": Task(
        size=Rhs,
        sizes={"tiny": Rhs(16), "small": Rhs(64), "large": Rhs(256)},
        inputs=rhs_inputs,
        forms={"array": rhs, "inplace": rhs_inplace, "loops": rhs_loops},
        gate=1e-10,
        gate32=4e-2,  # of lnA, whose loss cancels; H alone is right to 1e-5
        lower={"N": 4},
        floor="H",
    ),
    "ude": Task(
        size=Ude,
        sizes={"tiny": Ude(16), "small": Ude(32), "large": Ude(64)},
        inputs=ude_inputs,
        forms={"array": ude, "inplace": ude_inplace, "loops": ude_loops},
        gate=1e-8,
        gate32=8e-3,
        lower={"N": 4, "spy": 0},
    ),
    "semi_implicit": Task(
        size=SemiImplicit,
        sizes={"tiny": SemiImplicit(12, 5), "small": SemiImplicit(32, 20), "large": SemiImplicit(64, 40)},
        inputs=semi_implicit_inputs,
        forms={"array": semi_implicit, "inplace": semi_implicit_inplace, "loops": semi_implicit_loops},
        gate=1e-8,
        gate32=2e-3,
        lower={"N": 4},
    ),
}
