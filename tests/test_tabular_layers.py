"""The layers of networks for tables: derivatives, torch's autograd, published trajectories."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import array_api_compat.numpy as xp
import numpy as np
import pytest
from helpers.paths import DATA
from helpers.targets import Target, get_target

from portable_mlp import Network, check_layer
from portable_mlp.activations import SELU, Mish, Parametric, ReLU
from portable_mlp.embeddings import CosineEmbedding, PeriodicEmbedding
from portable_mlp.groups import Treatment
from portable_mlp.layers import Layer, Linear, NTKLinear, Repeat, Scale
from portable_mlp.losses import CallableLoss, Loss, SquaredError
from portable_mlp.optimizers import AdamW
from portable_mlp.schedules import FlatCosine, LogCosine, Schedule, Scheduled
from portable_mlp.sources import ArraySource
from portable_mlp.steps import Batch
from portable_mlp.training import Trainer

REFERENCE = DATA / "reference"
N, D = 17, 5


def layers(members: int | None) -> dict[str, Layer]:
    sigma = 0.7 if members is None else tuple(0.3 + 0.2 * i for i in range(members))
    return {
        "ntk_linear": NTKLinear(D, 4, members),
        "scale": Scale(D, members),
        "periodic": PeriodicEmbedding(D, D, sigma=sigma, members=members),
        "periodic, some columns": PeriodicEmbedding(D, 2, 7, 4, sigma, members),
        "cosine": CosineEmbedding(D, sigma=sigma, members=members),
        "selu": Parametric(SELU(), D, members),
        "mish": Parametric(Mish(), D, members),
    }


def around(layer: Layer, rng: np.random.RandomState) -> list[np.ndarray]:
    """Parameters that are not special, such as ones."""
    drawn = [p.init(rng, p.shape, p.fan_in, p.fan_out) for p in layer.params]
    return [p + 0.3 * rng.standard_normal(p.shape) for p in drawn]


@pytest.mark.parametrize("members", [None, 3])
@pytest.mark.parametrize("name", layers(None))
def test_layers_meet_finite_differences(name, members, rng, record_property):
    layer = layers(members)[name]
    x = rng.standard_normal((N, D) if members is None else (members, N, D))
    error = check_layer(layer, x, around(layer, rng), tol=1e-9)
    record_property("gradient checks: largest relative error", f"layer {name:24s} {error:.1e}")


def twin(name: str) -> Callable[..., Any]:
    """The same function of a single network, written with torch's functions."""
    torch = pytest.importorskip("torch")
    F = torch.nn.functional

    def periodic(x, w, b, v, c):
        each = [
            torch.cos(2 * torch.pi * x[:, i : i + 1] * w[i, 0] + b[i, 0]) @ v[i] + c[i, 0]
            for i in range(len(w))
        ]
        return torch.cat([x, *each], 1)

    def cosine(x, w, b, s, a):
        parts = []
        for i in range(x.shape[1]):
            own = x[:, i : i + 1]
            both = torch.cat([own, torch.cos(2 * torch.pi * (own * w[0, i] + b[0, i]))], 1)
            parts.append(a[0, i] + s[0, i] * both)
        return torch.cat(parts, 1)

    twins = {
        "ntk_linear": lambda x, w, b: x @ w / D**0.5 + b,
        "scale": lambda x, s: x * s,
        "periodic": periodic,
        "periodic, some columns": periodic,
        "cosine": cosine,
        "selu": lambda x, a: x + a * (F.selu(x) - x),
        "mish": lambda x, a: x + a * (F.mish(x) - x),
    }
    return twins[name]


@pytest.mark.parametrize("name", layers(None))
def test_layers_meet_autograd_member_by_member(name, rng):
    torch = pytest.importorskip("torch")
    layer, k = layers(3)[name], 3
    params, x = around(layer, rng), rng.standard_normal((k, N, D))
    y, residual = layer.forward(params, x, xp)
    dy = rng.standard_normal(y.shape)
    got = [layer.backward(params, residual, dy, xp), *layer.gradients(params, residual, dy, xp)]
    for i in range(k):
        # The axis of rows that a vector has in an ensemble broadcasts in the twin too
        own = [torch.tensor(a[i], requires_grad=True) for a in (x, *params)]
        out = twin(name)(*own)
        np.testing.assert_allclose(y[i], out.detach().numpy(), rtol=1e-12, atol=1e-13)
        out.backward(torch.tensor(dy[i]))
        for mine, theirs in zip(got, own, strict=True):
            np.testing.assert_allclose(mine[i], theirs.grad.numpy(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("make", [SELU, Mish])
def test_activations_at_large_and_small_inputs(make):
    torch = pytest.importorskip("torch")
    x = np.concatenate([-np.logspace(-30, 2.5, 200), np.logspace(-30, 4, 200), [0.0]])
    t = torch.tensor(x, requires_grad=True)
    wanted = getattr(torch.nn.functional, make.__name__.lower())(t)
    wanted.backward(torch.ones_like(wanted))
    y, residual = make().forward((), x, xp)
    np.testing.assert_allclose(y, wanted.detach().numpy(), rtol=1e-13, atol=1e-300)
    dx = make().backward((), residual, np.ones_like(x), xp)
    # SELU's derivative is f + λα, which cancels far below zero
    np.testing.assert_allclose(dx, t.grad.numpy(), rtol=1e-13, atol=1e-15)


# ---------------------------------------------------------------- initial values


@pytest.mark.parametrize("members", [None, 3])
def test_initial_values_suit_the_rows(members, rng):
    """Every unit has variance 1 over the rows, and its kink among them."""
    layers = PeriodicEmbedding(D, 4, members=members), NTKLinear(D + 12, 30, members)
    network = Network((*layers, Parametric(SELU(), 30, members), NTKLinear(30, 8, members)))
    x = 100.0 + 7.0 * rng.standard_normal((400, D) if members is None else (members, 400, D))
    params = network.init(np.random.RandomState(0), x)
    for n_layers in (2, 4):
        part = Network(network.layers[:n_layers])
        z = part(params[: len(part.params)], x, xp)
        np.testing.assert_allclose(z.std(axis=-2), 1.0, rtol=1e-9)
        assert (z.min(axis=-2) < 0).all()
        assert (z.max(axis=-2) > 0).all()
    plain = network.init(np.random.RandomState(0))
    assert [p.shape for p in plain] == [p.shape for p in params]


def test_a_constant_input_gives_finite_initial_values():
    layer = NTKLinear(3, 4)
    p = [q.init(np.random.RandomState(0), q.shape, 1, 1) for q in layer.params]
    assert all(
        np.isfinite(a).all()
        for a in layer.fitted_init(p, np.zeros((9, 3)), np.random.RandomState(0))
    )


# ---------------------------------------------------------------- published trajectories


def soft_cross_entropy(z: Any, t: Any, xp: Any) -> tuple[Any, Any]:
    """The loss for targets t that were rounded to float32, so that Σ t is not quite 1."""
    z = z - xp.max(z, axis=-1, keepdims=True)
    log_p = z - xp.log(xp.sum(xp.exp(z), axis=-1, keepdims=True))
    total = xp.sum(t, axis=-1, keepdims=True)
    return -xp.sum(t * log_p, axis=-1), xp.exp(log_p) * total - t


def squared_error(z: Any, y: Any, xp: Any) -> tuple[Any, Any]:
    return xp.sum((z - y) ** 2, axis=-1), 2.0 * (z - y)


def run(
    target: Target,
    network: Network,
    params: list[np.ndarray],
    data: Batch,
    loss: Any,
    treatments: dict[str, Treatment],
    optimizer: AdamW,
    rate: float,
    schedule: Schedule,
) -> tuple[list[np.ndarray], list[float]]:
    """The parameters after 20 steps on all rows, and the losses before each."""
    backend = target.backend
    chosen: Loss = CallableLoss(loss, SquaredError())
    trainer = Trainer(
        network, chosen, optimizer, backend, "float64", rate, schedule,
        batch_size=data.x.shape[0], tol=0.0, patience=1000, treatments=treatments,
    )  # fmt: skip
    with backend.scope("float64"):
        x, y = (backend.asarray(a, "float64") for a in (data.x, data.y))
    state = trainer.start(params)
    trainer.fit(state, ArraySource(Batch(x, y)), 20, np.random.RandomState(0))
    found = trainer.params(state.arrays.leaves)
    return [backend.to_host(p) for p in found], [e.loss for e in state.history]


RATES = {"class": 0.04, "reg": 0.2}


@pytest.mark.parametrize(
    "where", ["numpy", "numpy-eager", "numpy-loops", "cupy-emulated", "strict", "torch", "jax"]
)
@pytest.mark.parametrize("kind", ["class", "reg"])
@pytest.mark.parametrize("variant", ["td", "tds"])
def test_trajectories_of_realmlp(variant, kind, where, request, record_property):
    """RealMLP-TD and TD-S of pytabkit 1.7.3: 20 steps of training from the same initial values."""
    target = get_target(where, request)
    d = np.load(REFERENCE / f"realmlp_{variant}_{kind}.npz")
    n, with_embedding = int(d["n_params"]), variant == "td"
    names = [str(d[f"p{i}_name"]) for i in range(n)]
    act = SELU() if kind == "class" else Mish()
    n_out = d["y"].shape[-1]
    # [parameters' endings] and layers, in our order
    built: list[tuple[list[str], Layer]] = [([], Repeat(1))]
    width = D
    if with_embedding:
        built.append((
            ["weight_1", "bias_1", "weight_2", "bias_2"], PeriodicEmbedding(D, D, members=1)
        ))  # fmt: skip
        width = 4 * D
    built.append((["scale"], Scale(width, 1)))
    for j, place in enumerate(("first", "middle", "middle")):
        own = f"{place}_layer/layer-{j}/"
        built.append(([own + "weight", own + "bias"], NTKLinear(width, 16, 1)))
        width = 16
        built.append(([own + "act"], Parametric(act, 16, 1)) if with_embedding else ([], act))
    built.append((["layer-3/weight", "layer-3/bias"], NTKLinear(16, n_out, 1)))
    places = [next(i for i in range(n) if names[i].endswith(e)) for ends, _ in built for e in ends]
    network = Network(tuple(layer for _, layer in built))

    # The embedding of pytabkit gives [z, x], ours [x, z]
    order = np.r_[3 * D : 4 * D, : 3 * D]

    def ours(stage: str) -> list[np.ndarray]:
        found = []
        for i, param in zip(places, network.params, strict=True):
            a = d[f"p{i}_{stage}"]
            if with_embedding and names[i].endswith("scale"):
                a = a[..., order]
            if with_embedding and names[i].endswith("first_layer/layer-0/weight"):
                a = a[:, order]
            found.append(a.reshape(param.shape))
        return found

    # Labels' factors, as pytabkit has them; both factors enter the decay once more
    treatments = {}
    for i, param in zip(places, network.params, strict=True):
        rate, decay = map(float, d[f"p{i}_factors"])
        treatments[param.group] = Treatment(rate=rate, decay=rate * decay**2)
    optimizer = AdamW(
        beta_2=0.95, weight_decay=Scheduled(0.02 if with_embedding else 0.0, FlatCosine())
    )
    data = Batch(d["x"][0, 0], d["y"][0, 0])
    rate = RATES[kind] if with_embedding or kind == "class" else 0.07
    loss = soft_cross_entropy if kind == "class" else squared_error
    got, losses = run(
        target, network, ours("init"), data, loss, treatments, optimizer, rate, LogCosine()
    )
    wanted = ours("step20")
    worst = max(np.abs(g - w).max() / np.abs(w).max() for g, w in zip(got, wanted, strict=True))
    record_property(
        "published trajectories: largest relative difference after 20 steps",
        f"realmlp {variant:4s} {kind:6s} {target.name:16s} {worst:.1e}",
    )
    np.testing.assert_allclose(losses, d["loss"], rtol=1e-10)
    assert worst <= 1e-10


@dataclass(frozen=True)
class Mask(Layer):
    """Zeroes the last columns of each embedding, as many as each member says."""

    widths: tuple[int, ...]
    n_columns: int

    def mask(self, x: Any) -> Any:
        kept = np.arange(max(self.widths)) < np.array(self.widths)[:, None]
        return np.tile(kept, self.n_columns)[:, None, :].astype(np.float64)

    def forward(self, p: Any, x: Any, xp: Any) -> tuple[Any, None]:
        return x * self.mask(x), None

    def backward(self, p: Any, residual: None, dy: Any, xp: Any) -> Any:
        return dy * self.mask(dy)


@dataclass(frozen=True)
class Block(Layer):
    """Linear and ReLU for the members that have the block; the others pass through it."""

    linear: Linear
    on: tuple[bool, ...]

    @property
    def n_out(self) -> int:
        return self.linear.n_out

    @property
    def params(self) -> Any:
        return self.linear.params

    @property
    def _mask(self) -> Any:
        return np.array(self.on)[:, None, None]

    def forward(self, p: Any, x: Any, xp: Any) -> tuple[Any, Any]:
        z, _ = self.linear.forward(p, x, xp)
        y, _ = ReLU().forward((), z, xp)
        return np.where(self._mask, y, x) if not all(self.on) else y, (x, y)

    def _dz(self, residual: Any, dy: Any) -> Any:
        return dy * (residual[1] > 0) * self._mask

    def backward(self, p: Any, residual: Any, dy: Any, xp: Any) -> Any:
        dx = self.linear.backward(p, residual[0], self._dz(residual, dy), xp)
        return dx if all(self.on) else np.where(self._mask, dx, dy)

    def gradients(self, p: Any, residual: Any, dy: Any, xp: Any) -> Any:
        return self.linear.gradients(p, residual[0], self._dz(residual, dy), xp)


def test_trajectory_of_tabpack(request, record_property):
    """Three members of TabPack with one to three blocks: 20 steps with a rate for each member."""
    d, k = np.load(REFERENCE / "tabpack_adamw.npz"), 3
    blocks = [Block(Linear(60 if j == 0 else 16, 16, members=k), tuple(j < b for b in (1, 2, 3)))
              for j in range(3)]  # fmt: skip
    network = Network((
        Repeat(k), CosineEmbedding(D, members=k), Mask((8, 10, 12), D), *blocks,
        Linear(16, 1, members=k),
    ))  # fmt: skip
    names = [
        "emb.weight", "emb.bias", "emb.elementwise_affine_weight", "emb.elementwise_affine_bias",
        *(f"body.blocks.{j}.linear.{own}" for j in range(3) for own in ("weight", "bias")),
        "out.weight", "out.bias",
    ]  # fmt: skip

    def ours(stage: str) -> list[np.ndarray]:
        found = []
        for name, param in zip(names, network.params, strict=True):
            a = d[f"{stage}_{name}"]
            a = a.swapaxes(1, 2) if name.endswith("r.weight") or name == "out.weight" else a
            found.append(a.reshape(param.shape))
        return found

    rates, decays = map(tuple, (d["lr"].tolist(), d["wd"].tolist()))
    same = Treatment(rate=rates, decay=decays)
    data = Batch(d["x"], d["y"][:, None])
    target = get_target("numpy", request)
    with pytest.warns(RuntimeWarning, match="eagerly"):  # of the arrays in the layers above
        got, losses = run(
            target, network, ours("init"), data, squared_error,
            {"embedding": same, "weight": same, "bias": same},
            AdamW(weight_decay=1.0), 1.0, Schedule(),
        )  # fmt: skip
    wanted = ours("step20")
    worst = max(np.abs(g - w).max() / np.abs(w).max() for g, w in zip(got, wanted, strict=True))
    np.testing.assert_allclose(losses, d["loss"].mean(axis=1), rtol=1e-10)
    record_property(
        "published trajectories: largest relative difference after 20 steps",
        f"tabpack adamw {worst:.1e}",
    )
    assert worst <= 1e-10
