"""What each process of tests/test_processes.py runs: several models, each on its share of the rows."""

import contextlib
import json
import os
import sys
from pathlib import Path
from unittest import mock

import pyro
import pyro.distributions as dist
import torch
import zoo

import pyro_vem as vem
from pyro_vem.fit import minibatch, network

ROWS = 101  # no multiple of the number of processes


def _noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _counts(rate):
    return torch.poisson(rate, generator=torch.Generator().manual_seed(9))


def counts(x, y):
    sd = pyro.param("sd", torch.tensor(1.0), constraint=dist.constraints.positive)
    b = pyro.sample("b", dist.Normal(0.0, 5.0).expand([2]).to_event(1))
    with pyro.plate("rows", len(y), dim=-2):
        u = pyro.sample("u", dist.Normal(0.0, sd))
        with pyro.plate("counts", 3, dim=-1):
            pyro.sample("y", dist.Poisson((b[0] + b[1] * x + u).exp()), obs=y)


def indexed(group, x, y):
    """Rows that point at groups of their own process, and a likelihood on a grid."""
    sd = pyro.sample("sd", dist.HalfNormal(1.0))
    with pyro.plate("rows", ROWS if len(x) == 3 * ROWS else len(x) // 3):
        u = pyro.sample("u", dist.Normal(0.0, sd))
    with pyro.plate("counts", len(y)):
        pyro.sample("y", dist.Bernoulli(logits=x + u[group]), obs=y)


def mixture(y):
    weights = pyro.param("weights", torch.tensor([0.5, 0.5]), constraint=dist.constraints.simplex)
    means = pyro.param("means", torch.tensor([0.0, 1.0]))
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(means[z], 1.0), obs=y)


def effects(y):
    mean = pyro.param("mean", torch.tensor(0.0))
    sd = pyro.param("sd", torch.tensor(1.0), constraint=dist.constraints.positive)
    precision = pyro.sample("precision", dist.Gamma(2.0, 2.0))
    with pyro.plate("rows", len(y), dim=-2):
        u = pyro.sample("u", dist.Normal(mean, sd))
        with pyro.plate("within", 3, dim=-1):
            pyro.sample("y", dist.Normal(u, precision.rsqrt()), obs=y)


def vectors(y):
    """A prior whose moments are matched, and a shared vector whose elements are tied together."""
    loc = pyro.param("loc", torch.zeros(3))
    tril = pyro.param("tril", torch.eye(3), constraint=dist.constraints.lower_cholesky)
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=tril))
        pyro.sample("y", dist.Poisson(z.exp()).to_event(1), obs=y)


def clusters(y):
    """Observed vectors whose weighted moments are the M-step."""
    weights = pyro.param("weights", torch.tensor([0.5, 0.5]), constraint=dist.constraints.simplex)
    loc = pyro.param("loc", torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 0.0]]))
    tril = pyro.param("tril", torch.eye(3).repeat(2, 1, 1), constraint=dist.constraints.lower_cholesky)
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.MultivariateNormal(loc[z], scale_tril=tril[z]), obs=y)


def tied(y):
    prior = torch.eye(3) + 0.9 * (1 - torch.eye(3))
    b = pyro.sample("b", dist.MultivariateNormal(torch.zeros(3), prior))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Poisson(b.exp()).to_event(1), obs=y)


def robust(y):
    """A likelihood that is drawn where its scope is too wide for a grid."""
    loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.StudentT(4.0, loc, 1.0), obs=y)


class Encoder(torch.nn.Module):
    """Starts elsewhere in each process: the first one's weights are all processes'."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(int(os.environ.get("RANK", "0")))
        self.loc = torch.nn.Linear(3, 2)
        self.log_scale = torch.nn.Parameter(torch.zeros(2))

    def forward(self, y):
        loc = self.loc(y)
        return loc, self.log_scale.exp().expand_as(loc)


def factors(y):
    sd = pyro.param("sd", torch.tensor(0.7), constraint=dist.constraints.positive)
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=y.dtype), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(z @ MIXING[:2].to(y.dtype), sd).to_event(1), obs=y)


def amortized():
    return vem.AmortizedNormal(factors, {"z": Encoder()}, inputs="y")


MIXING = torch.tensor([[1.0, 0.5, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
x, u = _noise(ROWS, 3), 0.7 * _noise(ROWS, 1, seed=1)
y = _counts((0.5 + 0.3 * x + u).exp())
CASES = {
    "counts": (counts, {"x": x, "y": y}, None, ("rows",)),
    "indexed": (
        indexed,
        {"group": torch.arange(ROWS).repeat_interleave(3), "x": x.flatten(), "y": (y > 1).double().flatten()},
        None,
        ("rows", "counts"),
    ),
    "mixture": (mixture, {"y": _noise(ROWS) + 3.0 * (u[:, 0] > 0.2)}, None, ("rows",)),
    "clusters": (clusters, {"y": x @ MIXING + 3.0 * (u > 0.2)}, None, ("rows",)),
    "effects": (effects, {"y": u + 0.5 * x}, "auto", ("rows",)),
    "vectors": (vectors, {"y": _counts((x @ MIXING).exp())}, "auto", ("rows",)),
    "tied": (tied, {"y": _counts(torch.tensor([0.3, 0.1, -0.4]).exp().expand(ROWS, 3))}, "auto", ("rows",)),
    "factors": (factors, {"y": u + x}, amortized, ("rows",)),
    "robust": (robust, {"y": 1.0 + x[:, 0]}, None, ("rows",)),
}  # fmt: skip


def waves(y):
    """Four latents in one row: their term is drawn."""
    a, b, d = (pyro.sample(name, dist.Normal(0.0, 1.0)) for name in "abd")
    c = pyro.sample("c", dist.HalfNormal(1.0))
    with pyro.plate("rows", len(y)):
        wave = torch.tanh(a * y[:, 1] + b * torch.sin(c * y[:, 2] + d)) + a * d
        pyro.sample("y", dist.Normal(wave, 0.5), obs=y[:, 0])


WAVES = {"y": x}


def lines(x, y, w):
    """Whose closed forms depend on whether x varies."""
    a, b, c = (pyro.sample(name, dist.Normal(0.0, 5.0)) for name in "abc")
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(a + b * x, 0.5), obs=y)
        pyro.sample("w", dist.Normal(c, 1.0), obs=w)


def tight(x, y):
    """A regression whose prior says as much as its data: a process more that counts it would show."""
    b = pyro.sample("b", dist.Normal(torch.zeros(3), 0.1).to_event(1))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(x @ b, 1.0), obs=y)


class Coder(torch.nn.Module):
    """A linear encoder or decoder."""

    def __init__(self, inputs, outputs, is_encoder=False):
        super().__init__()
        self.layer, self.is_encoder = torch.nn.Linear(inputs, outputs), is_encoder

    def forward(self, x):
        out = self.layer(x)
        return (out[..., :1], (out[..., 1:] - 1).exp()) if self.is_encoder else out


def factor_model():
    """A decoder and a guide of three columns; weights differ between processes until the fit has one."""
    decoder, encoder = Coder(1, 3).double(), Coder(3, 2, True).double()
    model = zoo.through(decoder, 1)
    return model, vem.AmortizedNormal(model, {"z": encoder}, inputs="y")


COLUMNS = {"y": u @ torch.tensor([[1.0, -0.5, 2.0]], dtype=torch.float64) + 0.5 * x}
TIGHT = {"x": x, "y": x.sum(1) * 0.1 + _noise(ROWS, seed=4)}
TRAINED = ("tight", "counts", "held out")


def trained(name, rank, count):
    """Fits on batches: of shared factors only, with factors of rows, and of networks."""
    torch.manual_seed(rank)
    data, guide, settings, special = COLUMNS, None, {}, {}
    if name == "tight":
        model, data = tight, TIGHT
    elif name == "counts":
        model, data, *_ = CASES["counts"]
        settings = {"max_iter": 40}
    else:
        model, guide = factor_model()
        special = {"encoder_steps": 2}
        settings = {"max_iter": 30, "validation": share(COLUMNS, rank, count)}
    options = vem.FitOptions(sharded=("rows",), **special)
    own, settings = share(data, rank, count), {"batch_size": 10, **settings}
    with mock.patch.object(network, "WORTH_TRACE", 0.0):  # steps are few here
        fit = vem.fit_vem(vem.vem_model(model), own, guide=guide, options=options, progress=False, **settings)
    values = {n: v.reshape(-1).tolist() for n, v in {**fit.params, **fit.guide_params}.items()}
    every = [None] * count
    torch.distributed.all_gather_object(every, values)
    return {
        "elbo": fit.elbo,
        "se": fit.elbo_se,
        "values": values,
        "agree": all(other == values for other in every),
        "notes": fit.plan.notes,
        "first": fit.history[0].after,
    }


TRENDED = torch.linspace(0.0, 3.0, ROWS, dtype=torch.float64) + 0.5 * x[:, 0]


def uneven(rank, count):
    """Mean and sd of rows in streams that are never shuffled, of 3 and of 8 batches."""

    def model(y):
        mean = pyro.param("mean", torch.tensor(0.0))
        sd = pyro.param("sd", torch.tensor(1.0), constraint=dist.constraints.positive)
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(mean, sd), obs=y)

    own = (TRENDED[:21].split(7), TRENDED[21:].split(10))[rank]
    options = vem.FitOptions(sharded=("rows",))
    fit = vem.fit_vem(model, [{"y": part} for part in own], options=options, progress=False)
    return {name: float(value) for name, value in fit.params.items()}


def nested(group, y):
    """Groups that are rows of a process, but not of a batch."""
    with pyro.plate("groups", 4):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(z[group], 1.0), obs=y)


def gradient(rank, count):
    """Bound and gradient of all rows where a network starts: exact, as antithetic pairs are for squares."""
    found = []

    def look(climb, callbacks):
        fit = climb.fit
        call = fit.source.head(fit.rows.names, fit.rows.total)
        x = fit.start.requires_grad_()
        value = fit.value(x, {}, call, fit.noise(call, 4, climb.generator))
        value, slope = fit.summed(value.detach(), torch.autograd.grad(value, x)[0])
        found.extend([float(value), *slope.tolist()])
        raise StopIteration

    run, minibatch._Network.run = minibatch._Network.run, look
    torch.manual_seed(rank)
    (model, guide), options = factor_model(), vem.FitOptions(sharded=("rows",))
    own = share(COLUMNS, rank, count)
    with contextlib.suppress(StopIteration):
        vem.fit_vem(model, own, guide=guide, options=options, batch_size=ROWS, progress=False)
    minibatch._Network.run = run
    return found


def share(data, rank, count):
    """The rows of one process; what points at groups counts from its first one."""
    first, last = ROWS * rank // count, ROWS * (rank + 1) // count
    each = {name: len(value) // ROWS for name, value in data.items()}
    own = {name: value[first * each[name] : last * each[name]] for name, value in data.items()}
    return {**own, "group": own["group"] - first} if "group" in own else own


def fitted(name, rank, count):
    """What the test compares."""
    model, data, guide, plates = CASES[name]
    if callable(guide):
        guide = guide()
    options = vem.FitOptions(sharded=plates)
    fit = vem.fit_vem(
        vem.vem_model(model), share(data, rank, count), guide=guide, options=options, progress=False
    )
    return {
        "status": fit.status.name,
        "elbo": fit.elbo,
        "terms": {row.site: row.value for row in fit.terms.rows},
        "trace": [(step.block, step.after) for step in fit.history],
        "values": {n: v.reshape(-1).tolist() for n, v in {**fit.params, **fit.guide_params}.items()},
    }


def refused(plates, data, model=counts, **kwargs):
    """The message of a fit that does not start."""
    try:
        vem.fit_vem(model, data, options=vem.FitOptions(sharded=plates), progress=False, **kwargs)
    except (vem.ModelError, ValueError) as error:
        return str(error)
    return "it ran"


def main(path):
    """Write what the first process finds."""
    torch.distributed.init_process_group("gloo")
    rank, count = torch.distributed.get_rank(), torch.distributed.get_world_size()
    found = {name: fitted(name, rank, count) for name in CASES}
    found["trained"] = {name: trained(name, rank, count) for name in TRAINED}
    found["gradient"], found["uneven"] = gradient(rank, count), uneven(rank, count)
    data = share(CASES["counts"][1], rank, count)
    options = vem.FitOptions(sharded=("rows",))
    drawn = vem.fit_vem(waves, share(WAVES, rank, count), options=options, progress=False)
    found["drawn"] = {"card": repr(drawn), "elbo": drawn.elbo, "se": drawn.elbo_se}
    if rank == 0:
        drawn.save(path.replace("found.json", "drawn.fit"))
    columns = dict(
        zip("xyw", x[: len(data["y"])].T * torch.tensor([[float(rank)], [1.0], [1.0]]), strict=True)
    )

    def per_row(y):  # a latent of each row outside the plate
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([len(y)]).to_event(1))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def total(y):  # data outside the plate
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        pyro.sample("total", dist.Normal(b, 1.0), obs=y.sum())
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(b, 1.0), obs=y)

    found["refused"] = {
        "unknown": refused(("row",), data),
        "outside": refused(("rows",), {"y": data["y"][:, 0]}, total),
        "shapes": refused(("rows",), {"y": data["y"][:, 0]}, per_row),
        "guide": refused(("rows",), data, guide=pyro.infer.autoguide.AutoNormal(counts)),
        "forms": refused(("rows",), columns, lines, guide="auto"),
        "groups": refused(
            ("rows", "groups"), {"group": torch.arange(40) % 4, "y": x[:40, 0]}, nested, batch_size=10
        ),
        "plates": refused(("counts",), data, batch_size=10),
        "validation": refused(
            ("rows",), data, batch_size=10, validation=None if rank else data
        ),
        "starts": refused(("rows",), data, num_starts=2),
    }  # fmt: skip
    torch.distributed.destroy_process_group()
    found["threads"] = [Path(task, "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    if rank == 0:
        with open(path, "w") as file:
            json.dump(found, file)


if __name__ == "__main__":
    main(sys.argv[-1] + "/found.json")
