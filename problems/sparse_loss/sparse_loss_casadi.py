"""The sparse losses in CasADi: whole arrays (MX), K as one weight an edge (problems.sparse_loss.edges) and a sparse matrix.

Gathers and scatters are products with constant sparse matrices of ones, each the other's transpose.
"""

import casadi as ca
import numpy as np

from problems import Implementation
from problems.sparse_loss import edges


def picks(columns, n):
    """The sparse (n, len(columns)) matrix that picks columns: x @ picks is x[:, columns], k @ picks.T sums them up."""
    return ca.DM.triplet(list(map(int, columns)), list(range(len(columns))), ca.DM.ones(len(columns)), n, len(columns))


