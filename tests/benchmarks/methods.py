"""One method on one workload in a process of its own; prints a line of JSON.

``python methods.py METHOD WORKLOAD '{"lr": 0.05, "steps": 2000}'`` times the imports, the first call and
a second call with another seed; ``python methods.py versions`` lists the packages. The parent chooses
the interpreter, so nothing but numpy is imported at the top. Unconstrained means and standard deviations
by site go to the npz file named by ``--out``.
"""

import argparse
import json
import os
import platform
import resource
import sys
import time
import warnings
from importlib import metadata
from pathlib import Path

import data as workloads
import numpy as np

PACKAGES = (
    "pyro_vem", "torch", "pyro-ppl", "numpyro", "jax", "jaxlib", "pymc", "pymc-extras", "pytensor",
    "statsmodels", "scikit-learn", "scipy", "numpy",
)  # fmt: skip


def fit_vem(model, arrays, sizes, **setting):
    import models_pyro
    import torch

    import pyro_vem as vem

    tensors = {name: torch.from_numpy(value) for name, value in arrays.items()}

    def call(seed):
        fit = vem.fit_vem(getattr(models_pyro, model), tensors | sizes, seed=seed, progress=False, **setting)
        names = [name.removeprefix("guide.loc.") for name in fit.guide_params if ".loc." in name]
        found = {n: (fit.guide_params[f"guide.loc.{n}"], fit.guide_params[f"guide.scale.{n}"]) for n in names}
        work = sum(row.evaluations for row in fit.history), sum(row.products for row in fit.history)
        note = {"elbo": fit.elbo, "status": fit.status.name, "evaluations": work[0], "products": work[1]}
        return found, note

    return call


def pyro_svi(model, arrays, sizes, lr, steps):
    """ClippedAdam, whose rate falls to a hundredth; a fixed rate would end in a cloud round the optimum."""
    import models_pyro
    import pyro
    import torch
    from pyro.infer import SVI, Trace_ELBO
    from pyro.infer.autoguide import AutoNormal

    program = getattr(models_pyro, model)
    as_float = {
        n: torch.from_numpy(v).float() if v.dtype.kind == "f" else torch.from_numpy(v)
        for n, v in arrays.items()
    }

    def call(seed):
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        pyro.enable_validation(False)
        guide = AutoNormal(program)
        optim = pyro.optim.ClippedAdam({"lr": lr, "lrd": 0.01 ** (1 / steps)})
        svi = SVI(program, guide, optim, Trace_ELBO())
        for _ in range(steps):
            svi.step(**as_float, **sizes)
        store = {name: value.detach() for name, value in pyro.get_param_store().items()}
        names = [name.removeprefix("AutoNormal.locs.") for name in store if ".locs." in name]
        return {n: (store[f"AutoNormal.locs.{n}"], store[f"AutoNormal.scales.{n}"]) for n in names}, {}

    return call


def numpyro_svi(model, arrays, sizes, lr, steps):
    """As documented: SVI.run, which compiles its loop at each call."""
    import jax

    svi = _numpyro(model, lr, steps)

    def call(seed):
        result = svi.run(jax.random.key(seed), steps, progress_bar=False, **arrays, **sizes)
        return _numpyro_moments(result.params), {}

    return call


def numpyro_scan(model, arrays, sizes, lr, steps):
    """By hand: the whole run compiled once as a function of the key; a second call compiles nothing."""
    import jax

    svi = _numpyro(model, lr, steps)

    @jax.jit
    def run(key, arrays):
        state = svi.init(key, **arrays, **sizes)
        state, _ = jax.lax.scan(lambda s, _: svi.update(s, **arrays, **sizes), state, None, length=steps)
        return svi.get_params(state)

    def call(seed):
        return _numpyro_moments(run(jax.random.key(seed), arrays)), {}

    return call


def _numpyro(model, lr, steps):
    import jax.numpy as jnp
    import models_numpyro
    from numpyro.infer import SVI, Trace_ELBO
    from numpyro.infer.autoguide import AutoNormal
    from numpyro.optim import Adam

    program = getattr(models_numpyro, model)
    optim = Adam(lambda i: 0.5 * lr * (1 + jnp.cos(jnp.pi * i / steps)))
    return SVI(program, AutoNormal(program), optim, Trace_ELBO())


def _numpyro_moments(found):
    names = [name.removesuffix("_auto_loc") for name in found if name.endswith("_auto_loc")]
    return {n: (np.asarray(found[f"{n}_auto_loc"]), np.asarray(found[f"{n}_auto_scale"])) for n in names}


def pymc_advi(model, arrays, sizes, steps, lr=None):
    """Without a rate PyMC's default optimiser, a windowed Adagrad."""
    import models_pymc
    import pymc as pm

    built = getattr(models_pymc, model)

    def call(seed):
        chosen = {} if lr is None else {"obj_optimizer": pm.adam(learning_rate=lr)}
        with built(**arrays, **sizes):
            fit = pm.fit(steps, method="advi", random_seed=seed, progressbar=False, **chosen)
        mean, sd = fit.mean.eval(), fit.std.eval()
        where = {name: (rows, shape) for name, rows, shape, _ in fit.ordering.values()}
        return {
            _site(n): (mean[at].reshape(shape), sd[at].reshape(shape)) for n, (at, shape) in where.items()
        }, {}

    return call


def pymc_dadvi(model, arrays, sizes, draws=30, optimizer="trust-ncg"):
    import models_pymc
    from pymc_extras.inference import fit_dadvi

    built = getattr(models_pymc, model)

    def call(seed):
        program = built(**arrays, **sizes)
        fit = fit_dadvi(
            program, draws, n_draws=1, optimizer_method=optimizer, random_seed=seed, progressbar=False
        )
        mean, log_sd = np.split(np.asarray(fit.optimizer_result["x"].values), 2)
        found, at = {}, 0
        for name, value in program.initial_point().items():
            part = slice(at, at + value.size)
            found[_site(name)] = mean[part].reshape(value.shape), np.exp(log_sd[part]).reshape(value.shape)
            at += value.size
        return found, {}

    return call


def pymc_dadvi_lbfgs(model, arrays, sizes, draws=30):
    """Without Hessian products there is less to compile, and on small models less to run."""
    return pymc_dadvi(model, arrays, sizes, draws, "L-BFGS-B")


def sklearn_ridge(model, arrays, sizes):
    """The posterior mode of the same model: ridge with C = 1 and no intercept."""
    from sklearn.linear_model import LogisticRegression

    def call(seed):
        fit = LogisticRegression(C=1.0, fit_intercept=False, max_iter=1000).fit(arrays["x"], arrays["y"])
        return {"w": (fit.coef_[0], np.ones(len(fit.coef_[0])))}, {}

    return call


def statsmodels_mixed(model, arrays, sizes):
    """REML for radon; mean-field Bayes with Laplace or quadrature terms for the two GLMMs."""
    import statsmodels.api as sm
    from scipy import sparse
    from statsmodels.genmod.bayes_mixed_glm import BinomialBayesMixedGLM, PoissonBayesMixedGLM

    def call(seed):
        if model == "radon":
            sm.MixedLM(arrays["y"], sm.add_constant(arrays["floor"]), arrays["county"]).fit()
            return {}, {}
        kind = PoissonBayesMixedGLM if model == "poisson_glmm" else BinomialBayesMixedGLM
        x = arrays["x"].reshape(len(arrays["y"]), -1)
        rows, ident = np.arange(len(x)), np.zeros(sizes["groups"], dtype=int)
        z = sparse.csr_matrix((np.ones(len(x)), (rows, arrays["group"])), (len(x), sizes["groups"]))
        np.random.seed(seed)  # noqa: NPY002 (statsmodels starts at draws of the global generator)
        kind(arrays["y"], np.column_stack([np.ones(len(x)), x]), z, ident, vcp_p=1.0, fe_p=2.0).fit_vb()
        return {}, {}

    return call


METHODS = {
    f.__name__: f
    for f in (
        fit_vem,
        pyro_svi,
        numpyro_svi,
        numpyro_scan,
        pymc_advi,
        pymc_dadvi,
        pymc_dadvi_lbfgs,
        sklearn_ridge,
        statsmodels_mixed,
    )
}


def _site(name):
    return name.removesuffix("_log__")


def peak_mb():
    """Linux carries ru_maxrss over from the parent through exec; VmHWM begins anew."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    own = [int(line.split()[1]) for line in lines if line.startswith("VmHWM")]
    return (own[0] if own else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 1024


def versions():
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("method")
    parser.add_argument("workload", nargs="?")
    parser.add_argument("setting", nargs="?", default="{}", type=json.loads)
    parser.add_argument("--out")
    parser.add_argument("--calls", type=int, default=2)
    options = parser.parse_args()
    # What the packages print is kept from the line of JSON.
    report, sys.stdout = sys.stdout, open(os.devnull, "w")  # noqa: SIM115
    warnings.simplefilter("ignore")
    if options.method == "versions":
        report.write(json.dumps(versions()))
        return
    model, arrays, sizes = workloads.load(options.workload)
    peak = 0.0
    seconds, found, note = [time.perf_counter()], {}, {}
    call = METHODS[options.method](model, arrays, sizes, **options.setting)
    for number in range(options.calls):
        seconds.append(time.perf_counter())
        sites, note = call(number)
        moments = {name: [np.asarray(part, dtype=float) for part in pair] for name, pair in sites.items()}
        seconds.append(time.perf_counter())
        found |= {f"{number}.{n}.{k}": part for n, pair in moments.items() for k, part in enumerate(pair)}
        if number == 0:
            peak = peak_mb()
    if options.out:
        np.savez(options.out, **found)
    line = {"import_seconds": seconds[1] - seconds[0], "first_seconds": seconds[2] - seconds[1]}
    line["second_seconds"] = seconds[4] - seconds[3] if options.calls > 1 else None
    report.write(json.dumps(line | {"peak_mb": peak} | note))


if __name__ == "__main__":
    main()
