"""Running Pyro programs as functions: parameters and choices in, sites out.

Everything that touches Pyro's or torch's global state, or an internal of theirs, is in this
module: `isolated` puts the state back, `Program` swaps parameters and weights for one run.
"""

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, TypeAlias

import numpy as np
import pyro
import torch
from pyro.distributions import Delta
from pyro.distributions.torch_distribution import MaskedDistribution, TorchDistributionMixin
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _DIM_ALLOCATOR
from torch import Tensor, nn

from .device import generators, on_device, seed_generators, set_generators, wake
from .dtypes import Widened, default_dtype

Site: TypeAlias = dict[str, Any]
"""A Pyro message of type "sample" or "param" after the run: name, fn, value, scale, mask, ..."""

Around: TypeAlias = Callable[[tuple[Any, ...], Mapping[str, Any]], Messenger]
"""Gives a run of a program, by its arguments, a handler."""

Choose: TypeAlias = Callable[[Site], Tensor | None]
"""Gives a latent site its value; None leaves the draw to the site's own distribution."""


# Weights are swapped for plain tensors during a run, which pyro.module remarks on.
SWAPPED = ".*not registered in the param store"
BROADCAST_SHAPES: Any = torch.broadcast_shapes
REUSED = 31 << 20  # bytes: glibc lets the block below set the size up to 32 MB


@contextmanager
def isolated(
    dtype: torch.dtype | None = None,
    seed: int = 0,
    threads: int | None = None,
    device: torch.device | None = None,
) -> Iterator[None]:
    """Run pyro code without a trace in global state.

    Inside: an empty parameter store, seeded generators, validation off, no handler and no plate
    of the caller in sight, gradients on, `dtype` as default, torch on `threads` and `device` if given.
    On the way out, also after an exception, all of it is as it was.

    Example:
        >>> import pyro
        >>> with isolated():
        ...     p = pyro.param("only_inside", torch.zeros(()))
        >>> "only_inside" in pyro.get_param_store()
        False
    """
    wake(device)
    usual_threads = torch.get_num_threads()
    taken, _DIM_ALLOCATOR._stack = _DIM_ALLOCATOR._stack, []  # dimensions of plates
    try:
        if threads is not None and threads != usual_threads:
            torch.set_num_threads(threads)
        with (
            repeatable(),
            pyro.poutine.block(),  # before other handlers, so that those of the caller see nothing
            pyro.get_param_store().scope(),
            default_dtype(dtype or torch.get_default_dtype()),
            on_device(device or torch.get_default_device()),
            light_shapes(),
            torch.inference_mode(False),
            torch.enable_grad(),
            warnings.catch_warnings(),
        ):
            warnings.filterwarnings("ignore", message=SWAPPED)
            seed_generators(seed)
            yield
    finally:
        if torch.get_num_threads() != usual_threads:
            torch.set_num_threads(usual_threads)
        _DIM_ALLOCATOR._stack = taken


def reuse_memory() -> None:
    """Let freed arrays of some megabytes be used again, instead of going back to the system.

    glibc maps a large array anew, page by page, until a larger one has been freed (mallopt(3), on the
    dynamic threshold); the faults took a tenth of a fit of ten thousand rows. Nothing is written here.
    """
    torch.empty(REUSED, dtype=torch.uint8, device="cpu")


@contextmanager
def without_process_group() -> Iterator[None]:
    """Hide the process group of torch.distributed from what is imported inside the block.

    torch.distributed.nn, which torch's compiler imports, makes the group that there is the default of
    its functions. destroy_process_group() then leaves the group's threads running, and one process in
    dozens aborts as it ends.
    """
    distributed: Any = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        yield
        return
    group, distributed.group.WORLD = distributed.group.WORLD, None
    try:
        yield
    finally:
        distributed.group.WORLD = group


@contextmanager
def light_shapes() -> Iterator[None]:
    """`torch.broadcast_shapes` by NumPy inside the block, where torch's own has not been used yet.

    At its first use, by any MultivariateNormal, torch's loads sympy: a quarter of a second.
    """
    if "sympy" not in sys.modules:
        torch.broadcast_shapes = _broadcast_shapes
    try:
        yield
    finally:
        torch.broadcast_shapes = BROADCAST_SHAPES


def _broadcast_shapes(*shapes: Any) -> torch.Size:
    try:
        return torch.Size(np.broadcast_shapes(*shapes))
    except (ValueError, TypeError):  # also more dimensions, or larger ones, than NumPy has
        made: torch.Size = BROADCAST_SHAPES(*shapes)
        return made


@contextmanager
def repeatable() -> Iterator[None]:
    """Run extra probes of a user's program: validation off, generators put back afterwards.

    Example:
        >>> with repeatable():
        ...     torch.manual_seed(3)
        <torch._C.Generator object at ...>
    """
    rng = generators()
    torch_validation = torch.distributions.Distribution._validate_args
    try:
        with pyro.validation_enabled(False):
            yield
    finally:
        torch.distributions.Distribution._validate_args = torch_validation
        set_generators(rng)


class Execution(Widened):
    """One run of a program: substitutes parameters and values, records every site.

    Args:
        params: constrained values by name; a name that is missing keeps Pyro's own behaviour.
        choose: values of latent sites.
    """

    def __init__(self, params: Mapping[str, Tensor], choose: Choose) -> None:
        super().__init__()
        self.given, self._choose = params, choose
        self.visited: list[str] = []
        self.sites: dict[str, Site] = {}
        self.params: dict[str, Site] = {}
        self.deterministic: dict[str, Site] = {}
        self.subsampled: list[str] = []

    @property
    def latents(self) -> dict[str, Site]:
        """Latent sites that are not summed out."""
        return {n: s for n, s in self.sites.items() if not (s["is_observed"] or is_summed_out(s))}

    def _pyro_param(self, msg: Site) -> None:
        self.visited.append(msg["name"])
        if msg["name"] in self.given:
            msg["value"] = self.given[msg["name"]]

    def _pyro_post_param(self, msg: Site) -> None:
        super()._pyro_post_param(msg)
        self.params[msg["name"]] = msg

    def _pyro_sample(self, msg: Site) -> None:
        self.visited.append(msg["name"])
        is_enumerated = msg["done"] and is_summed_out(msg)
        if msg["is_observed"] or is_subsample(msg) or is_enumerated:
            return
        value = self._choose(msg)
        if value is not None:
            msg["value"] = value

    def _pyro_post_sample(self, msg: Site) -> None:
        name = msg["name"]
        if is_subsample(msg):
            return
        super()._pyro_post_sample(msg)
        self.subsampled += [f.name for f in msg["cond_indep_stack"] if f.full_size not in (None, f.size)]
        if is_deterministic(msg):
            self.deterministic[name] = msg
        elif name in self.sites:
            raise ValueError(f"site {name!r} appears twice in one run: give each site its own name")
        else:
            self.sites[name] = msg


def is_subsample(msg: Site) -> bool:
    """True for the bookkeeping site that a subsampling plate makes."""
    return type(msg["fn"]).__name__ == "_Subsample"


def is_deterministic(msg: Site) -> bool:
    """True for pyro.deterministic sites, and for sites that a reparameterisation has computed."""
    fn = msg["fn"]
    is_masked_out = isinstance(fn, MaskedDistribution) and fn._mask is False
    return msg["is_observed"] and is_masked_out and isinstance(fn.base_dist, Delta)


def is_summed_out(msg: Site) -> bool:
    """True for a discrete site that asks to be enumerated in parallel."""
    return not msg["is_observed"] and (msg["infer"] or {}).get("enumerate") == "parallel"


class Enumeration(EnumMessenger):  # type: ignore[misc]
    """Pyro's parallel enumeration; its own records shapes through ``.data``, which vmap refuses."""

    def _pyro_post_sample(self, msg: Site) -> None:
        if not isinstance(msg["fn"], TorchDistributionMixin) or msg["value"] is None:
            return
        shape = msg["value"].shape[: msg["value"].dim() - msg["fn"].event_dim]
        known = msg["infer"].setdefault("_dim_to_id", {})
        known.update(self._param_dims.get(msg["name"], {}))
        self._value_dims[msg["name"]] = {
            dim: identity for dim, identity in known.items() if len(shape) >= -dim and shape[dim] > 1
        }


class Scout(Messenger):  # type: ignore[misc]
    """What must be known before a program's first checked run.

    A discrete site that is to be summed out gets one value for all its rows: models index with it,
    and rows x values of what they look up may not fit in memory.

    Attributes:
        summed_out: names of the discrete sites that ask to be enumerated.
        depth: dimensions that plates take, from the right.
    """

    def __init__(self) -> None:
        super().__init__()
        self.summed_out: list[str] = []
        self.depth = 0

    def _pyro_sample(self, msg: Site) -> None:
        if is_subsample(msg) or not is_summed_out(msg):
            return
        self.summed_out.append(msg["name"])
        fn = msg["fn"]
        msg["value"] = fn.enumerate_support(expand=False)[0].reshape(fn.event_shape)

    def _pyro_post_sample(self, msg: Site) -> None:
        depths = [-frame.dim for frame in msg["cond_indep_stack"] if frame.vectorized]
        self.depth = max([self.depth, *depths])


class _Shell(nn.Module):
    """A module round the program, so that torch's own functional_call can swap weights in it."""

    def __init__(self, modules: list[nn.Module]) -> None:
        super().__init__()
        self.contents = nn.ModuleList(modules)

    def forward(self, run: Callable[[], Any]) -> Any:
        return run()


class Program:
    """A Pyro callable with the modules it calls, run as a function of its parameters.

    Example:
        >>> import pyro.distributions as dist
        >>> def model(): return pyro.sample("z", dist.Normal(pyro.param("m", torch.tensor(0.)), 1.))
        >>> run = Program(model).run((), {}, {"m": torch.tensor(3.0)}, lambda site: site["fn"].mean)
        >>> run.sites["z"]["value"]
        tensor(3.)
    """

    def __init__(self, fn: Callable[..., Any], modules: list[nn.Module] | None = None) -> None:
        self.fn = fn
        self.first_available_dim: int | None = None  # left of all plates, if sites are summed out
        self.around: Around | None = None  # handler of each recorded run, from its arguments
        self.is_batched = False  # whether the data are a batch of rows, which plates may scale themselves
        self.modules = modules or []
        self.shell = _Shell(self.modules)
        self.weight_paths: dict[int, str] = {id(p): path for path, p in self.shell.named_parameters()}
        self._paths: dict[str, str] = {}
        self._constants: dict[str, Tensor] = {}

    def own_weights(self, names: Mapping[str, str], dtype: torch.dtype | None) -> None:
        """Say which parameter name stands for which weight; the rest are constants in `dtype`.

        (A ``PyroParam`` is no weight: its ``*_unconstrained`` tensor reaches the program through
        a param message.)
        """
        self._paths = dict(names)
        owned = set(names.values())
        tensors = [*self.shell.named_parameters(), *self.shell.named_buffers()]
        self._constants = {
            path: _copy(tensor, dtype)
            for path, tensor in tensors
            if path not in owned and dtype is not None and not path.endswith("_unconstrained")
        }

    def path_of(self, tensor: object) -> str | None:
        """Path of the weight that a param message was made from, in a run of this program."""
        for path, constant in self._constants.items():
            if constant is tensor:
                return path
        return None

    @property
    def owned_weights(self) -> dict[int, str]:
        """Parameter name of each weight that a step owns, by the weight's identity."""
        names = {path: name for name, path in self._paths.items()}
        return {key: names[path] for key, path in self.weight_paths.items() if path in names}

    def run(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], params: Mapping[str, Tensor], choose: Choose
    ) -> Execution:
        """Run once; the returned record holds every site in program order."""
        return self.under(Execution(params, choose), args, kwargs, params)

    def under(
        self,
        execution: Execution,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        params: Mapping[str, Tensor],
    ) -> Execution:
        """Run once under a recorder of the caller's, parameters swapped in; returns the recorder."""
        execution.given = params
        run = self.fn
        if self.first_available_dim is not None:
            run = Enumeration(self.first_available_dim)(run)
        with execution, self.around(args, kwargs) if self.around else nullcontext():
            self._with_weights(params, self._constants, lambda: run(*args, **kwargs))
        return execution

    def apply(self, params: Mapping[str, Tensor], function: Callable[[], Any]) -> Any:
        """Call a function of modules of this program, with `params` in place of weights."""
        with pyro.poutine.substitute(data={n: v for n, v in params.items() if n not in self._paths}):
            return self._with_weights(params, self._constants, function)

    def call(self, params: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Call the program as Pyro would, with `params` in place of its parameters, in their dtype."""
        stored = {name: value for name, value in params.items() if name not in self._paths}
        run = pyro.poutine.substitute(self.fn, data=stored)
        with default_dtype(torch.float64), Widened(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=SWAPPED)
            return self._with_weights(params, self._constants, lambda: run(*args, **kwargs))

    def _with_weights(
        self, params: Mapping[str, Tensor], constants: Mapping[str, Tensor], run: Callable[[], Any]
    ) -> Any:
        weights = {path: params[name] for name, path in self._paths.items() if name in params}
        if not weights and not constants:
            return run()
        # A module in training mode writes into its buffers (BatchNorm): each run has its own.
        own = {k: v if isinstance(v, nn.Parameter) else v.clone() for k, v in constants.items()}
        return torch.func.functional_call(self.shell, {**own, **weights}, (run,))


def _copy(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight or buffer in another dtype; Pyro registers only what looks like a weight."""
    value = tensor.detach()
    if tensor.is_floating_point():
        value = value.to(dtype)
    return nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
