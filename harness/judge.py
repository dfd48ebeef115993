"""Correctness before speed: the error of a gradient, block by block, against a reference it did not make itself.

A reference is a whole gradient (complex step of the statement, or the hand adjoint that passed) or, where no such exists,
directional derivatives of the statement: four random directions a block, each entry itself where a block has at most
four. For a gradient g with error e, E |D e|^2 / E |D g|^2 = |e|^2 / |g|^2, so both give the same relative 2-norm error.

NumPy and the standard library only: it runs inside the workers.
"""

import zlib
from typing import Any

import numpy as np

DIRECTIONS = 4


def directions(block: str, size: int) -> np.ndarray:
    """(k, size): the unit vectors where there are at most four, else four normal vectors, the same in every process."""
    if size <= DIRECTIONS:
        return np.eye(size)
    return np.random.default_rng(zlib.crc32(f"{block} {size}".encode())).standard_normal((DIRECTIONS, size))


def directional(loss: Any, theta: dict, data: dict, *, h: float | None = None) -> dict[str, np.ndarray]:
    """Block -> derivatives of the loss along its directions, by complex step; by central differences of step h if given."""
    derivatives = {}
    for name, block in theta.items():

        def along(step, name=name, block=block):
            return loss(theta | {name: block + step.reshape(block.shape)}, data)

        D = directions(name, block.size)
        if h is None:
            derivatives[name] = np.array([np.imag(along(1e-20j * d)) / 1e-20 for d in D])
        else:
            derivatives[name] = np.array([(along(h * d) - along(-h * d)) / (2 * h) for d in D])
    return derivatives


def error(gradient: np.ndarray, whole: np.ndarray | None, along: np.ndarray | None, block: str) -> float:
    """Relative 2-norm error of one block. Infinite where the gradient is not finite or the reference is zero."""
    g = np.asarray(gradient, dtype=float).ravel()
    want = along if whole is None else np.asarray(whole, dtype=float).ravel()
    assert want is not None
    if not np.isfinite(g).all():
        return float("inf")
    got = directions(block, g.size) @ g if whole is None else g
    if got.shape != want.shape:
        return float("inf")
    norm = np.linalg.norm(want)
    return float(np.linalg.norm(got - want) / norm) if norm > 0 else float("inf")


def extent(whole: np.ndarray | None, along: np.ndarray | None, size: int) -> tuple[float, float]:
    """(2-norm, share of entries that are not zero) of a reference; both estimated where it is directional."""
    found = np.asarray(along if whole is None else whole)
    norm = float(np.linalg.norm(found)) / (1.0 if whole is not None or size <= DIRECTIONS else np.sqrt(len(found)))
    return norm, float(np.count_nonzero(found) / found.size)


def loss_error(loss: float, want: float, theta: dict, gradient: dict) -> float:
    """Relative error of the loss, on the scale on which the loss can be known at all.

    Rounding theta alone moves the loss by eps sum |theta_i g_i|: where terms cancel, as in alpha / dx^2 lap u, that is
    far more than eps |loss|.
    """
    scale = abs(want) + sum(float(np.sum(np.abs(block * gradient[name]))) for name, block in theta.items())
    return abs(loss - want) / scale if np.isfinite(loss) and scale > 0 else float("inf")


def gold_dot(array: np.ndarray) -> float:
    """Inner product with gold(size, 5): one number that a reader can compare."""
    from problems import gold

    return float(np.asarray(array, dtype=float).ravel() @ gold(array.size, 5))
