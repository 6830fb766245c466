"""The peers do the work that our model does: same numbers, not just same shapes."""

import dataclasses
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax import ladder
from bitnet_jax.errors import ConfigError
from bitnet_jax.loss import cross_entropy
from bitnet_jax.model import apply_model
from bitnet_jax.optim import OptimizerConfig
from bitnet_jax.train_step import init_state
from experiments.benchmark import peers, step
from experiments.benchmark.workload import Workload

# Two query heads share a key head, and no two widths are equal but those that must be.
SHAPE = ladder.Shape(layers=2, width=32, ff_width=48, heads=4, kv_heads=2)
TINY = Workload(sizes=("27k",), sequence_length=24, batch_tokens=96, vocab=40, microbatches=2)


@pytest.fixture(autouse=True)
def tiny_ladder(monkeypatch):
    monkeypatch.setitem(ladder.LADDER, "27k", SHAPE)


@pytest.fixture(scope="module", autouse=True)
def quick_compiler():
    """Half the time to compile; nothing here is about speed."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def test_a_peer_without_a_counterpart():
    pytest.importorskip("torch")
    with pytest.raises(ConfigError, match="--peer=torch: .*bf16 and ternary"):
        peers.load("torch", Workload(arms=("fp16", "fp32")))


def test_only_the_peers_own_package_may_be_missing(monkeypatch):
    """A module of ours that is missing is a bug, and no advice to install PyTorch."""

    def missing(name):
        raise ModuleNotFoundError("No module named 'bitnet_jax.x'", name="bitnet_jax.x")

    monkeypatch.setattr(peers.importlib, "import_module", missing)
    with pytest.raises(ModuleNotFoundError, match="bitnet_jax.x"):
        peers.load("torch", TINY)


# PyTorch


@pytest.fixture
def torch():
    """On one thread: models so small are not worth more."""
    module = pytest.importorskip("torch")
    threads = module.get_num_threads()
    module.set_num_threads(1)
    yield module
    module.set_num_threads(threads)


@pytest.fixture
def torch_peer(torch):
    from experiments.benchmark.peers import torch_peer

    return torch_peer


@pytest.fixture
def params():
    """As large as ours are at first, and norms that are not all ones."""
    draw = np.random.default_rng(0).standard_normal
    tree = jax.eval_shape(lambda: init_state(TINY.step("27k", "fp32"), 0).params)

    def fill(path, leaf):
        name, values = path[-1].key, draw(leaf.shape, np.float32)
        if name == "scale":
            return 1 + 0.3 * values
        return values / np.sqrt(leaf.shape[-2 if name == "kernel" else -1])

    return jax.tree_util.tree_map_with_path(fill, tree)


def in_torch(torch_peer, params, ternary, dtype):
    model = torch_peer.Transformer(TINY.model("27k"), TINY.sequence_length, ternary, dtype)
    torch_peer.copy_parameters(model, params)
    return model


def batch(torch):
    ours = TINY.batch()
    theirs = torch.from_numpy(np.array(ours)).long()
    return ours, theirs[:, :-1], theirs[:, 1:]


def gradients(torch_peer, arm, params, tokens):
    """(loss, its gradients by PyTorch's names) of ours."""
    config = TINY.step("27k", arm)

    @jax.jit
    def compute(params):
        def loss(params):
            logits = apply_model(config.model, config.precision, params, tokens[:, :-1])
            return cross_entropy(logits, tokens[:, 1:])[0].mean()

        return jax.value_and_grad(loss)(params)

    value, grads = compute(params)
    return float(value), dict(torch_peer.by_torch_name(grads))


def test_torch_computes_our_logits_in_float32(torch, torch_peer, params):
    tokens, inputs, targets = batch(torch)
    model = in_torch(torch_peer, params, ternary=False, dtype=torch.float32)
    config = TINY.step("27k", "fp32")
    forward = jax.jit(lambda p: apply_model(config.model, config.precision, p, tokens[:, :-1]))
    logits = forward(params)
    np.testing.assert_allclose(model(inputs).detach().numpy(), logits, atol=1e-4)
    nats = cross_entropy(logits, tokens[:, 1:])[0].mean()
    assert model.loss(inputs, targets).item() == pytest.approx(float(nats), abs=1e-5)


def test_torch_computes_our_ternary_gradients(torch, torch_peer, params):
    """Ours multiplies codes and theirs dequantized bfloat16 values: alike, not equal."""
    tokens, inputs, targets = batch(torch)
    model = in_torch(torch_peer, params, ternary=True, dtype=torch.bfloat16)
    value, grads = gradients(torch_peer, "ternary", params, tokens)
    loss = model.loss(inputs, targets)
    loss.backward()
    assert loss.item() == pytest.approx(value, abs=5e-3)
    for name, parameter in model.named_parameters():
        theirs, ours = parameter.grad.flatten().numpy(), grads[name].ravel()
        cosine = theirs @ ours / np.linalg.norm(theirs) / np.linalg.norm(ours)
        assert cosine > 0.99, name
        assert np.linalg.norm(theirs) == pytest.approx(np.linalg.norm(ours), rel=0.05), name
    plain = in_torch(torch_peer, params, ternary=False, dtype=torch.bfloat16)
    assert abs(plain.loss(inputs, targets).item() - value) > 0.02  # the two arms do differ


def test_torch_fakes_trits_and_int8(torch, torch_peer):
    """By hand: mean |w| is 1.5; the largest x of the first token is 127."""
    w = torch.tensor([[3.0, -0.7], [0.8, -1.5]])
    assert torch_peer.quantize_weights(w).tolist() == [[1.5, 0.0], [1.5, -1.5]]
    x = torch.tensor([[127.0, -63.4], [0.0, 0.0]])
    np.testing.assert_allclose(torch_peer.quantize_activations(x), [[127, -63], [0, 0]], rtol=1e-6)


def test_torch_passes_gradients_straight_through(torch, torch_peer):
    """By hand, with the operands above: the product of the rounded ones, and their gradients."""
    layer = torch_peer.BitLinear(2, 2, torch.float32)
    with torch.no_grad():
        layer.kernel.copy_(torch.tensor([[3.0, -0.7], [0.8, -1.5]]))
    x = torch.tensor([[127.0, -63.4]], requires_grad=True)
    y = layer(x)
    y.backward(torch.tensor([[1.0, 2.0]]))
    np.testing.assert_allclose(y.detach(), [[1.5 * 127, 1.5 * 127 + 1.5 * 63]], rtol=1e-5)
    np.testing.assert_allclose(x.grad, [[1.5 + 3.0, -3.0]], rtol=1e-5)
    np.testing.assert_allclose(layer.kernel.grad, [[127, -63], [254, -126]], rtol=1e-5)


@pytest.mark.parametrize("clip_norm", [1e9, 0.1])
def test_torch_accumulates_and_clips(clip_norm, torch, torch_peer, params):
    """Two microbatches give the gradient of the whole batch's mean."""
    config = TINY.step("27k", "bf16")
    config = dataclasses.replace(config, optimizer=OptimizerConfig(clip_norm=clip_norm))
    model = in_torch(torch_peer, params, ternary=False, dtype=torch.float32)
    _, inputs, targets = batch(torch)
    model.loss(inputs, targets).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    norm = torch.cat([grad.flatten() for grad in expected.values()]).norm().item()
    torch_peer.Training(model, config, TINY.batch())()
    for name, p in model.named_parameters():
        scaled = expected[name] * min(1.0, clip_norm / norm)
        np.testing.assert_allclose(p.grad, scaled, atol=1e-5, err_msg=name)


@pytest.fixture
def without_compiler(torch, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("no C++ compiler\nand more")

    monkeypatch.setattr(torch, "compile", fail)


def test_torch_trains(torch, torch_peer, params, without_compiler, monkeypatch):
    """Both arms from our parameters, in eager mode where there is no compiler."""
    monkeypatch.setattr(torch_peer, "initial_state", lambda config: SimpleNamespace(params=params))
    found = torch_peer.contenders(TINY, "27k", TINY.batch())
    assert list(found) == ["torch_bf16", "torch_ternary"]
    assert {c.arm: c.goal for c in found.values()} == {"bf16": 1.0, "ternary": 1.0}
    contender = found["torch_bf16"]
    assert "eager, since torch.compile failed (no C++ compiler)" in contender.notes[0]
    assert contender.compile_seconds > 0 and contender.peak_bytes is None
    tokens, inputs, targets = batch(torch)
    model = contender.step.model
    before = model.loss(inputs, targets).item()
    old = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(8):
        contender.step()
    assert model.loss(inputs, targets).item() < before - 0.05
    assert all((p != old[name]).any() for name, p in model.named_parameters())


@pytest.mark.slow
def test_torch_steps_are_ours(torch, torch_peer):
    """From the same parameters, float32 steps change each by the same, to a hundredth of it.

    Adam's direction hides a gradient's size, so rounding shows in the weights of small gradients;
    without weight decay a change would be a fiftieth off.
    """
    config = TINY.step("27k", "fp32")
    ours = step.Training(config, step.compile_step(config, TINY.batch_shape()), TINY.batch())
    before = dict(torch_peer.by_torch_name(ours.state.params))
    model = in_torch(torch_peer, ours.state.params, ternary=False, dtype=torch.float32)
    theirs = torch_peer.Training(model, config, TINY.batch())
    for _ in range(2):
        ours()
        theirs()
    for name, after in torch_peer.by_torch_name(ours.state.params):
        change = after - before[name]
        error = model.get_parameter(name).detach().numpy() - after
        assert np.linalg.norm(error) < 0.01 * np.linalg.norm(change), name


@pytest.mark.slow
def test_torch_compiles(torch_peer):
    """With a C++ compiler at hand, the steps are compiled ones."""
    if not shutil.which("g++"):
        pytest.skip("no C++ compiler")
    small = dataclasses.replace(TINY, arms=("ternary",), layers=1, microbatches=1)
    (contender,) = torch_peer.contenders(small, "27k", TINY.batch()).values()
    assert ", torch.compile" in contender.notes[0] and "eager" not in contender.notes[0]
    contender.step()


# Qwix


def test_qwix_quantizes_the_projections_and_nothing_else():
    """Seven products of int8 in the scanned block; ours and Qwix's modules have one shape."""
    qwix_peer = pytest.importorskip("experiments.benchmark.peers.qwix_peer")
    config = TINY.model("27k")
    model = qwix_peer.quantized(config)
    tokens = TINY.batch()[:, :-1]
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), tokens)["params"])
    ours = jax.eval_shape(lambda: init_state(TINY.step("27k", "bf16"), 0).params)
    assert sorted(x.shape for x in jax.tree.leaves(params)) == sorted(
        x.shape for x in jax.tree.leaves(ours)
    )
    lowered = jax.jit(lambda params: model.apply({"params": params}, tokens)).lower(params)
    products = [line for line in lowered.as_text().splitlines() if "dot_general" in line]
    assert sum("xi8>, " in line for line in products) == 7


@pytest.mark.slow
def test_qwix_trains():
    qwix_peer = pytest.importorskip("experiments.benchmark.peers.qwix_peer")
    (contender,) = qwix_peer.contenders(TINY, "27k", TINY.batch()).values()
    assert contender.arm == "ternary" and contender.goal is None
    assert contender.peak_bytes > 0 and contender.compile_seconds > 0
    contender.step()
    assert jnp.isfinite(contender.step._state[0]["embedding"]).all()
