"""Fixtures shared by all tests."""

import pyro
import pytest
import torch
import twin

import pyro_vem as vem

twin.register()  # before the first backward pass, at which autograd makes its queues for devices


@pytest.fixture(autouse=True)
def _fresh():
    """Every test starts from the same random state and an empty parameter store."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    yield
    pyro.clear_param_store()


@pytest.fixture
def fit():
    """`fit_vem` without a progress bar."""

    def call(*args, **kwargs):
        return vem.fit_vem(*args, progress=False, **kwargs)

    return call


@pytest.fixture
def global_state():
    """A snapshot of everything global that a fit must leave alone."""

    def snapshot():
        store = pyro.get_param_store()
        return {
            "params": {name: store[name].detach().clone() for name in store},
            "rng": torch.get_rng_state(),
            "dtype": torch.get_default_dtype(),
            "validation": torch.distributions.Distribution._validate_args,
            "settings": pyro.settings.get(),  # Pyro's validation flags among them
            "handlers": list(pyro.poutine.runtime._PYRO_STACK),
            "threads": torch.get_num_threads(),
            "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        }

    def same(before):
        after = snapshot()
        for key, value in before.items():
            if key == "params":
                assert after[key].keys() == value.keys()
                assert all(torch.equal(after[key][name], value[name]) for name in value)
            elif key == "rng":
                assert torch.equal(after[key], value), "torch's generator has moved"
            else:
                assert after[key] == value, key

    return snapshot, same
