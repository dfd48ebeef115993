"""The libraries: one file each (`backends/<name>_backend.py`), how it differentiates, waits, moves data, counts memory.

A backend file ends with one final class, `BACKEND = ...`. Reading it imports nothing of the library; constructing it does,
after `environ` came into force. A method named after a strategy is that strategy: it takes `loss(theta, data)` (or the
function that the implementation gave for the strategy) and returns `derivative(theta, data) -> (loss, {block: gradient})`.
A library that reads source code finds the author's function behind it: `loss.of(theta, data, *loss.static)` is the same call.
The first is the backend's main strategy. Where an implementation gave a function for a strategy, `<strategy>_given` takes
it, if there is one, because the loss is checkpointed, or compiled, already.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.metadata import version
from types import ModuleType
from typing import Any, ClassVar, NamedTuple


class Strategy(NamedTuple):
    sentence: str
    reference: str
    gate: float | None = None  # where the method itself is approximate; else the task's gate judges


# The closed vocabulary: how a derivative is got.
STRATEGIES = {
    "adjoint": Strategy(
        "The reverse pass written by hand: the measure of all others.",
        "Giles and Pierce, Flow Turbul. Combust. 65 (2000) 393",
    ),
    "reverse": Strategy(
        "Reverse mode: one backward pass through the primal gives every entry of the gradient.",
        "Griewank and Walther, Evaluating Derivatives, SIAM 2008, ch. 3",
    ),
    "forward": Strategy(
        "Forward mode: one jvp an entry of theta, batched where the library can.",
        "Griewank and Walther, Evaluating Derivatives, SIAM 2008, ch. 3",
    ),
    "checkpoint": Strategy(
        "Reverse mode that stores some states only and computes the others again.",
        "Griewank and Walther, ACM TOMS 26 (2000) 19",
    ),
    "duals": Strategy(
        "Forward mode by dual numbers, a + b eps with eps^2 = 0.", "Revels, Lubin and Papamarkou, arXiv 1607.07892"
    ),
    "tape": Strategy(
        "Reverse mode over a recorded list of operations.",
        "Griewank and Walther, Evaluating Derivatives, SIAM 2008, ch. 6",
    ),
    "compile": Strategy(
        "Reverse mode on a graph that was captured and compiled.", "Ansel et al., ASPLOS 2024 (PyTorch 2)"
    ),
    "func": Strategy("Reverse mode as a function transformation.", "Frostig, Johnson and Leary, MLSys 2018 (JAX)"),
    "custom_rule": Strategy(
        "Reverse mode with a rule of its own over a solve, an FFT or a fixed point, never over the physics.",
        "Blondel et al., arXiv 2105.15183",
    ),
    "backsolve": Strategy(
        "Continuous adjoint that integrates the state backwards beside it.",
        "Chen et al., arXiv 1806.07366 (neural ODEs)",
    ),
    "interpolating": Strategy(
        "Continuous adjoint on the stored, interpolated forward solution.",
        "Serban and Hindmarsh, CVODES, ASME IDETC 2005",
    ),
    "quadrature": Strategy(
        "Continuous adjoint, parameter gradient as a quadrature afterwards.", "Ma et al., arXiv 1812.01892"
    ),
    "sensitivity": Strategy(
        "Continuous forward sensitivities, integrated beside the state.",
        "Maly and Petzold, Appl. Numer. Math. 20 (1996) 57",
    ),
    "implicit": Strategy(
        "The implicit function theorem at a converged solution: one linear solve.", "Blondel et al., arXiv 2105.15183"
    ),
    "complex_step": Strategy(
        "Im loss(theta + i h e) / h, an entry at a time: exact to rounding on holomorphic code.",
        "Martins, Sturdza and Alonso, ACM TOMS 29 (2003) 245",
    ),
    "difference": Strategy(
        "Central differences, an entry at a time: two primals an entry, its error is a column.",
        "Nocedal and Wright, Numerical Optimization, Springer 2006, section 8.1",
        gate=0.1,
    ),
}

Loss = Callable[[dict, dict], Any]


def double_only(who: str, arrays: Mapping[str, Any]) -> None:
    """Raises TypeError where one of the arrays is float32."""
    for name, a in arrays.items():
        if a.dtype == "float32":
            raise TypeError(f"{who} computes in float64 only, and {name} is float32")


class Backend(ABC):
    """A library. `device` is cpu or cuda; the constructor imports the library and raises ImportError where it is absent."""

    requires: ClassVar[tuple[str, ...]]  # distributions to import, their versions go into every record
    env: ClassVar[str] = "main"  # the environment whose interpreter runs the workers
    pins: ClassVar[tuple[str, ...]] = ()  # the whole lock of that environment, where it is not the main one
    devices: ClassVar[tuple[str, ...]] = ("cpu",)
    programs: ClassVar[Mapping[str, tuple[str, ...]]] = {}  # strategy -> compilers, of which it needs one
    # NumPy's and SciPy's modules -> the library's own, with which the statement is tried as it is; None: it takes no NumPy code
    namespace: ClassVar[Mapping[str, str] | None] = None
    # strategies that run the loss for each entry of theta and compile nothing -> in which numbers and how often
    entrywise: ClassVar[Mapping[str, tuple[type, int]]] = {}
    all_cores: ClassVar[bool] = False  # whether a full run measures its main strategy on all processors, too

    @staticmethod
    def environ(threads: int) -> dict[str, str]:
        """Environment variables that must be in force before the library is imported."""
        return {}

    @abstractmethod
    def __init__(self, device: str): ...

    @abstractmethod
    def put(self, array) -> Any:
        """The NumPy array as the library's own, on the device, same dtype."""

    @abstractmethod
    def get(self, array) -> Any:
        """The library's array as a NumPy array."""

    @abstractmethod
    def wait(self, result) -> Any:
        """The result, once the device has finished computing it."""

    @abstractmethod
    def primal(self, loss: Loss) -> Loss:
        """The loss as this library runs it without differentiating; `<strategy>_primal` where a strategy has its own way."""

    def as_is(self, statement: ModuleType, loss: Loss) -> Loss:
        """A loss of this copy of a statement, in whose globals the library's own NumPy may be put; nothing else is changed."""
        for name, value in list(vars(statement).items()):
            if isinstance(value, ModuleType) and value.__name__ in (self.namespace or {}):
                setattr(statement, name, import_module(self.namespace[value.__name__]))
        return loss

    def keep_compiled(self, implementation: ModuleType, folder: str) -> None:
        """Lets this folder keep what the module compiles, for the next process: where references are made, never where
        compiling is timed."""
        return

    def where(self, array) -> str:
        """The kind of device that holds the library's array: cpu or cuda."""
        return "cpu"

    def device_memory(self) -> int | None:
        """Peak bytes the library's allocator held on the device since the last call, None on the CPU."""
        return None

    @classmethod
    def strategies(cls) -> tuple[str, ...]:
        """Its strategies in the order of the file, the main one first."""
        return tuple(name for name in vars(cls) if name in STRATEGIES)

    @classmethod
    def versions(cls) -> dict[str, str]:
        return {name: version(name) for name in cls.requires}
