"""Fits on batches: a step of a variational autoencoder beside Pyro and NumPyro; ten million rows on disk.

Run by ``make bench-scale``; NumPyro's row needs the extra "peers". All of a table comes from one process.
"""

import argparse
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

import pyro_vem as vem

INNER, HIDDEN, BATCH = 8, 128, 100
TRAIN = 1500  # of the 1,797 digits


def say(text: str) -> None:
    """A line on standard output, at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


class Encoder(nn.Module):
    """Means and sds of the latents of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(64, HIDDEN), nn.Softplus())
        self.loc, self.log_scale = nn.Linear(HIDDEN, INNER), nn.Linear(HIDDEN, INNER)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(loc, scale)."""
        hidden = self.hidden(x)
        return self.loc(hidden), self.log_scale(hidden).exp()


def networks() -> tuple[nn.Module, nn.Module]:
    """The same start every time."""
    torch.manual_seed(1)
    decoder = nn.Sequential(nn.Linear(INNER, HIDDEN), nn.Softplus(), nn.Linear(HIDDEN, 64))
    return decoder, Encoder()


def images() -> tuple[Tensor, Tensor]:
    """Binarised digits of scikit-learn: for training, and held out."""
    from sklearn.datasets import load_digits

    x = torch.tensor((load_digits().data > 7).astype(np.float32))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return x[order[:TRAIN]], x[order[TRAIN:]]


def program(decoder: nn.Module) -> Any:
    """The model."""

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(INNER), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    return model


def bound(decoder: Any, encoder: Any, x: Tensor, draws: int = 200) -> float:
    """The bound of rows in nats a row, by hand: the KL in closed form, the rest on draws."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        loc, scale = encoder(x)
        kl = (0.5 * (scale**2 + loc**2 - 1) - scale.log()).sum()
        total = 0.0
        for _ in range(draws):
            z = loc + scale * torch.randn(loc.shape, generator=generator, dtype=loc.dtype)
            total += float(dist.Bernoulli(logits=decoder(z)).log_prob(x).sum())
    return (total / draws - float(kl)) / len(x)


def ours(epochs: int, mode: Any) -> tuple[float, float, str]:
    """Held-out bound, milliseconds a step (the median epoch's), and what the plan says."""
    train, held_out = images()
    decoder, encoder = networks()
    model = program(decoder)
    guide = vem.AmortizedNormal(model, {"z": encoder}, inputs="x")
    fit = vem.fit_vem(
        model, {"x": train}, guide=guide, batch_size=BATCH, max_iter=epochs, compile=mode, progress=False
    )
    for name, value in {**fit.params, **fit.guide_params}.items():
        owner = decoder if name.startswith("decoder") else encoder
        owner.get_parameter(name.split("$$$")[1]).data = value
    steps = [row.seconds / row.evaluations for row in fit.history[len(fit.history) // 2 :]]
    notes = [note for note in fit.plan.notes if note.startswith("steps")]
    score = bound(decoder, encoder, held_out.double())
    return score, 1e3 * float(np.median(steps)), notes[0] if notes else "eager"


def pyro_svi(epochs: int) -> tuple[float, float, str]:
    """Pyro's SVI with its own mean-field bound, by hand."""
    from pyro.infer import SVI, TraceMeanField_ELBO

    train, held_out = images()
    decoder, encoder = networks()

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("rows", len(x)):
            loc, scale = encoder(x)
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    pyro.clear_param_store()
    svi = SVI(program(decoder), guide, pyro.optim.Adam({"lr": 1e-3}), TraceMeanField_ELBO())
    seconds = []
    for _ in range(epochs):
        order, start = torch.randperm(TRAIN), time.perf_counter()
        for i in range(0, TRAIN, BATCH):
            svi.step(train[order[i : i + BATCH]])
        seconds.append((time.perf_counter() - start) * BATCH / TRAIN)
    return bound(decoder, encoder, held_out), 1e3 * float(np.median(seconds)), "float32"


def numpyro_svi(epochs: int) -> tuple[float, float, str]:
    """NumPyro's jitted update, whose compilation is not counted."""
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as ndist
    from numpyro.infer import SVI, TraceMeanField_ELBO

    train, held_out = images()

    def linear(p: Any, x: Any) -> Any:
        return x @ p["w"] + p["b"]

    def dense(key: Any, n: int, m: int) -> Any:
        edge = n**-0.5
        w, b = jax.random.split(key)
        return {
            "w": jax.random.uniform(w, (n, m), minval=-edge, maxval=edge),
            "b": jax.random.uniform(b, (m,), minval=-edge, maxval=edge),
        }

    keys = jax.random.split(jax.random.PRNGKey(1), 5)
    start = {"hidden": dense(keys[0], INNER, HIDDEN), "out": dense(keys[1], HIDDEN, 64)}
    code = {
        "hidden": dense(keys[2], 64, HIDDEN), "loc": dense(keys[3], HIDDEN, INNER),
        "log_scale": dense(keys[4], HIDDEN, INNER),
    }  # fmt: skip

    def decode(p: Any, z: Any) -> Any:
        return linear(p["out"], jax.nn.softplus(linear(p["hidden"], z)))

    def encode(p: Any, x: Any) -> Any:
        hidden = jax.nn.softplus(linear(p["hidden"], x))
        return linear(p["loc"], hidden), jnp.exp(linear(p["log_scale"], hidden))

    def model(x: Any) -> None:
        p = numpyro.param("decoder", start)
        with numpyro.plate("rows", len(x)):
            z = numpyro.sample("z", ndist.Normal(jnp.zeros(INNER), 1.0).to_event(1))
            numpyro.sample("x", ndist.Bernoulli(logits=decode(p, z)).to_event(1), obs=x)

    def guide(x: Any) -> None:
        p = numpyro.param("encoder", code)
        with numpyro.plate("rows", len(x)):
            loc, scale = encode(p, x)
            numpyro.sample("z", ndist.Normal(loc, scale).to_event(1))

    svi = SVI(model, guide, numpyro.optim.Adam(1e-3), TraceMeanField_ELBO())
    data = jnp.asarray(train.numpy())
    state = svi.init(jax.random.PRNGKey(0), data[:BATCH])
    update, rng, seconds = jax.jit(svi.update), np.random.default_rng(0), []
    for _ in range(epochs):
        order, begin = rng.permutation(TRAIN), time.perf_counter()
        for i in range(0, TRAIN, BATCH):
            state, loss = update(state, data[order[i : i + BATCH]])
        loss.block_until_ready()
        seconds.append((time.perf_counter() - begin) * BATCH / TRAIN)
    params = svi.get_params(state)

    def as_torch(function: Any, part: str) -> Any:
        def call(x: Tensor) -> Any:
            made = function(params[part], jnp.asarray(x.numpy()))
            made = made if isinstance(made, tuple) else (made,)
            found = tuple(torch.from_numpy(np.array(value)) for value in made)
            return found if len(found) > 1 else found[0]

        return call

    score = bound(as_torch(decode, "decoder"), as_torch(encode, "encoder"), held_out)
    return score, 1e3 * float(np.median(seconds)), "float32, jitted"


def autoencoder(epochs: int) -> None:
    """A step of each, and the bound of held-out digits after the same epochs."""
    rows = [
        ("pyro_vem, eager", lambda: ours(epochs, False)),
        ("pyro_vem, traced or compiled", lambda: ours(epochs, True)),
        ("Pyro SVI", lambda: pyro_svi(epochs)),
        ("NumPyro SVI", lambda: numpyro_svi(epochs)),
    ]
    say(f"{epochs} epochs of {TRAIN} digits in batches of {BATCH}")
    say("| | held-out bound, nats a row | ms a step | |\n| --- | --- | --- | --- |")
    for name, run in rows:
        try:
            score, step, note = run()
        except ImportError as error:
            say(f"| {name} | - | - | {error} |")
            continue
        say(f"| {name} | {score:.3f} | {step:.3f} | {note} |")


def many_rows(rows: int, batch: int) -> None:
    """Logistic regression on a memory map: rows a second, and memory as epochs go by."""
    rng = np.random.default_rng(0)
    weights = np.array([0.5, -1.0, 0.25, 0.0])
    with tempfile.TemporaryDirectory() as folder:
        table = np.lib.format.open_memmap(Path(folder) / "table.npy", "w+", "float32", (rows, 5))
        for i in range(0, rows, 1_000_000):
            part = table[i : i + 1_000_000]
            part[:, :4] = rng.normal(size=(len(part), 4))
            part[:, 4] = rng.uniform(size=len(part)) < 1 / (1 + np.exp(-(part[:, :4] @ weights)))
        table.flush()
        del table
        on_disk = np.load(Path(folder) / "table.npy", mmap_mode="r")

        def model(table: Tensor) -> None:
            w = pyro.sample("w", dist.Normal(torch.zeros(4), 1.0).to_event(1))
            with pyro.plate("rows", len(table)):
                pyro.sample("y", dist.Bernoulli(logits=table[:, :4] @ w), obs=table[:, 4])

        seen: list[str] = []

        def watch(step: Any, _: Any) -> None:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            rate = step.evaluations * batch / step.seconds
            seen.append(f"epoch {step.iteration}: {rate:,.0f} rows a second, peak {peak:,.0f} MB")
            say(seen[-1])

        start = time.perf_counter()
        fit = vem.fit_vem(model, {"table": on_disk}, batch_size=batch, callbacks=[watch], progress=False)
        seconds = time.perf_counter() - start
    loc, scale = fit.guide_params["guide.loc.w"].numpy(), fit.guide_params["guide.scale.w"].numpy()
    off = np.abs(loc - weights) / scale
    say(f"{rows:,} rows in {seconds:.0f} s, {fit.status.name}; means {loc.round(4)}, sds {scale.round(6)}")
    say(f"largest distance from the weights that made the data: {off.max():.1f} posterior sds")


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="*", default=["autoencoder", "rows"])
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--batch", type=int, default=10_000)
    chosen = parser.parse_args()
    if "autoencoder" in chosen.parts:
        autoencoder(chosen.epochs)
    if "rows" in chosen.parts:
        many_rows(chosen.rows, chosen.batch)


if __name__ == "__main__":
    main()
