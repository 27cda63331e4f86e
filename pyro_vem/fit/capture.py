"""Tracing the bound once, and compiling the trace: for long fits of models that no closed form covers.

Tracing runs model, guide and both backward passes once and records the tensor operations; what
closes over them (data, fixed draws, compiled coefficients) becomes input. The graphs go through
inductor, which needs a C++ compiler; replayed as they are they save little. A graph is believed
only after it agrees with the model at random points; a model that looks at values of tensors has
no graph.
"""

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ..bound.compiled.linear import as_operations
from ..model.runtime import without_process_group

if TYPE_CHECKING:
    from .setup import Setup

Compile = Literal["auto"] | bool
Graph = Callable[..., Any]

WORTH = 30.0  # seconds spent on running the model after which "auto" pays for a compiler: about its price
AGREEMENT = 1e-8  # relative
POINTS, SPREAD = 3, 0.1


@dataclass(frozen=True)
class Captured:
    """Minus the bound in one block as graphs of (x, other block).

    Attributes:
        both: value and gradient.
        product: Hessian times a vector, the third argument.
    """

    both: Graph
    product: Graph


@dataclass
class Captures:
    """Which blocks run as compiled graphs, and when that pays.

    Attributes:
        mode: "auto", True (at once) or False (never).
        spent: seconds of steps so far that ran the model.
        reasons: why a block has no graph.
    """

    mode: Compile
    spent: float = 0.0
    done: dict[str, Captured] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    def of(self, setup: "Setup", block: str, x: Tensor, other: Tensor) -> Captured | None:
        """The graphs of a block, made when they are due; a note in the plan says what was done."""
        is_due = self.mode is True or (self.mode == "auto" and self.spent > WORTH)
        if block in self.done or block in self.reasons or not is_due or not x.numel():
            return self.done.get(block)
        start = time.perf_counter()
        found = capture(function_of(setup, block), x, other)
        if isinstance(found, str):
            self.reasons[block] = found
            setup.objective.add_note(f"{block}-step not captured: {found}")
        else:
            self.done[block] = found
            setup.objective.add_note(f"{block}-step compiled in {time.perf_counter() - start:.0f} s")
        return self.done.get(block)

    def forget(self) -> None:
        """The bound has changed: its graphs are of no use any more."""
        self.done.clear()
        self.reasons.clear()

    def start_again(self) -> None:
        """The bound takes longer or shorter from here on: what has been spent says nothing of it."""
        self.forget()
        self.spent = 0.0


def function_of(setup: "Setup", block: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Minus the bound as a function of one block and the other."""
    if block == "E":
        return lambda x, other: -setup.elbo(x, other)
    if block == "M":
        return lambda x, other: -setup.elbo(other, x)
    sizes = [setup.phi.size, setup.theta.size]
    return lambda x, other: -setup.elbo(*x.split(sizes))


def capture(function: Callable[[Tensor, Tensor], Tensor], x: Tensor, other: Tensor) -> Captured | str:
    """Graphs of a function's value, gradient and Hessian products, verified; or why there are none.

    Args:
        function: of a block and the other block.
        x: where the block is; the graphs are checked round it.
        other: the other block.
    """

    def both(x: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        value = function(x, other)
        (gradient,) = torch.autograd.grad(value, x)
        return value.detach(), gradient

    def product(x: Tensor, other: Tensor, v: Tensor) -> tuple[Tensor]:
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(function(x, other), x, create_graph=True)
        (result,) = torch.autograd.grad((gradient * v).sum(), x, materialize_grads=True)
        return (result,)

    generator = torch.Generator().manual_seed(0)
    points = [
        [x + SPREAD * _noise(x, generator), other + SPREAD * _noise(other, generator)] for _ in range(POINTS)
    ]
    graphs = []
    for eager, extra in ((both, False), (product, True)):
        arguments = [[*point, _noise(x, generator)] if extra else point for point in points]
        try:
            graph = compiled(eager, arguments[0])
            gap = max(gap_between(graph(*given), eager(*given)) for given in arguments)
        except Exception as error:  # whatever tracer or compiler refuses, the eager path serves
            return str(error).strip().splitlines()[0][:160]
        if not gap <= AGREEMENT:
            return f"its graph is off by {gap:.1g}: the model looks at values, or leaves torch"
        graphs.append(graph)
    return Captured(*graphs)


def _noise(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=like.dtype)


def gap_between(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The largest difference between two lists of tensors, relative to each one's size."""
    worst = 0.0
    for a, b in zip(found, wanted, strict=True):
        gap = float((a - b).abs().max() / (b.abs().max() + 1e-300)) if b.numel() else 0.0
        worst = max(worst, gap if gap == gap else float("inf"))
    return worst


def compiled(eager: Callable[..., Any], arguments: list[Tensor], has_compiler: bool = True) -> Graph:
    """The graph of a function of tensors, through inductor or replayed as it is."""
    with warnings.catch_warnings(), without_process_group():
        warnings.simplefilter("ignore")  # torch's of itself
        # Here: they load dynamo and sympy, seconds that few fits need.
        import torch._dynamo  # noqa: F401
        import torch._inductor as inductor
        from torch.fx.experimental.proxy_tensor import make_fx

    with as_operations(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's of itself
        module = make_fx(eager)(*arguments)
        constants = _lift(module)
        graph: Graph = inductor.compile(module, [*arguments, *constants]) if has_compiler else module
    return lambda *given: graph(*given, *constants)


def _lift(module: Any) -> list[Tensor]:
    """Turn the tensors that a graph holds into inputs, after those that it has."""
    constants: dict[str, Any] = {}
    last = [node for node in module.graph.nodes if node.op == "placeholder"][-1]
    for node in list(module.graph.nodes):
        if node.op != "get_attr":
            continue
        if node.target not in constants:
            with module.graph.inserting_after(last):
                last = module.graph.placeholder(f"lifted_{len(constants)}")
            constants[node.target] = last, getattr(module, node.target)
        node.replace_all_uses_with(constants[node.target][0])
        module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    module.recompile()
    return [value.detach() for _, value in constants.values()]
