"""Training adapters on a frozen base: each as if it were alone, and nothing else ever changes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from experiments.pretraining import next_token_loss
from flora_jax.models.quantize import quantize_model
from flora_jax.train.data.packing import PackedTokens
from flora_jax.train.loss import HeadChunks, frozen_head_nll, token_scores
from flora_jax.train.step import StepOptions, init_adapter_state, make_adapter_step, make_scorer
from flora_jax.weights.quantized import Quantized
from tests.helpers.random_adapters import KINDS, random_adapter
from tests.helpers.tiny_training import (
    CONFIG,
    VOCABULARY,
    grouped,
    only,
    random_batch,
    stacked,
    tiny_model,
)

TARGETS = ("attn.c_attn", "mlp.c_proj")
# A step compiles in seconds: the tests share as few as they can, in this one shape. Eight rows of
# ten tokens reach the limit from which weights are built, parts of them do not.
MANY, ROWS, LENGTH, STEPS = 3, 8, 10, 8
CLIP = 0.0111


def rate(step):
    return jnp.float32(1e-2) / (1 + step)


def adamw(decay=0.0):
    return optax.chain(optax.clip_by_global_norm(1e9), optax.adamw(rate, weight_decay=decay))


# Per kind: the optimizer, the step's options, the adapters' options. Plain descent shows how far a
# clipped gradient went.
RECIPES = {
    "lora": (adamw(), {"dropout": 0.3}, {"rank": 2, "alpha": 3.0}),
    "flora": (adamw(decay=0.1), {}, {"rank": 3, "init": "frozen_ones"}),
    "ia3": (adamw(), {}, {}),
    "hira": (
        optax.chain(optax.clip_by_global_norm(CLIP), optax.sgd(lambda n: 100 * rate(n))),
        {},
        {"rank": 2},
    ),
}


@functools.cache
def model(dtype="float32"):
    return tiny_model(0, dtype, n_layer=1)


@functools.cache
def step_of(kind, **options):
    optimizer, own, _ = RECIPES[kind]
    return make_adapter_step(model().graph, optimizer, rate, StepOptions(**own, **options))


def adapters_of(kind):
    _, _, options = RECIPES[kind]
    projections = CONFIG.projections()
    return [random_adapter(kind, n, projections, targets=TARGETS, **options) for n in range(MANY)]


def keys_of(many):
    return jax.vmap(jax.random.key)(jnp.arange(many, dtype=jnp.uint32))


def batches_of(steps=STEPS):
    """Rows that are masked out, whole or in part, so that the parts of a step count differently."""
    found = []
    for number in range(steps):
        batch = random_batch(1, MANY, ROWS, LENGTH, step=number)
        mask = batch.mask.at[0].set(0.0).at[1, :, 3:].set(0.0)
        found.append(batch._replace(mask=mask))
    return found


def train(kind, adapters, batches, keys=None, base=None, **options):
    """The final parameters, and what was measured at each step as ``{name: [steps, …]}``."""
    step = step_of(kind, **options)
    base = model().params if base is None else base
    with jax.numpy_dtype_promotion("standard"):
        state = init_adapter_state(stacked(adapters), RECIPES[kind][0])
    keys = keys_of(len(adapters)) if keys is None else keys
    measured = []
    for batch in batches:
        given = state
        state, found = step(state, base, batch, keys)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given.params))
        measured.append(jax.tree.map(np.asarray, found))
    assert int(state.step) == len(measured)
    measures = {name: np.stack([m[name] for m in measured]) for name in measured[0]}
    return jax.tree.map(np.asarray, state.params), measures


@functools.cache
def together(kind):
    return train(kind, adapters_of(kind), batches_of())


def pairs(found, expected):
    return zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)


def assert_close(found, expected, rtol=1e-3, atol=2e-5):
    for a, b in pairs(found, expected):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


# The loss, computed beside the head without its logits.


def head_case(seed, shape, dtype):
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.standard_normal((*shape, 16)), dtype)
    head = jnp.asarray(rng.standard_normal((16, VOCABULARY)) / 2, dtype)
    return hidden, head, jnp.asarray(rng.integers(0, VOCABULARY, shape), jnp.int32)


@pytest.mark.parametrize(
    "shape, positions, dtype",
    [
        ((2, 7), 1, "float32"),
        ((3, 10), 4, "float32"),
        ((1, 8), 4, "float32"),
        ((2, 5), 100, "float32"),
        ((4, 1), 1, "bfloat16"),
        ((3, 10), 4, "bfloat16"),
    ],
)
@pytest.mark.parametrize("even", [False, True])
def test_loss_and_gradient_are_those_of_full_logits(shape, positions, dtype, even):
    chunks = HeadChunks(positions * VOCABULARY * shape[0], even)
    hidden, head, targets = head_case(sum(shape), shape, dtype)
    weights = jnp.asarray(np.random.default_rng(1).uniform(-1, 2, shape), jnp.float32)

    def ours(hidden, head):
        return jnp.sum(frozen_head_nll(hidden, head, targets, chunks) * weights)

    def expected(hidden, head):
        logits = jnp.matmul(hidden, head, preferred_element_type=jnp.float32)
        return next_token_loss(logits, targets, weights)[0]

    with_slope = [jax.jit(jax.value_and_grad(f, argnums=(0, 1))) for f in (ours, expected)]
    (value, slopes), (right, right_slopes) = (f(hidden, head) for f in with_slope)
    np.testing.assert_allclose(value, right, rtol=1e-5)
    assert slopes[0].dtype == hidden.dtype
    wide = np.asarray(right_slopes[0], np.float32)
    error = np.abs(np.asarray(slopes[0], np.float32) - wide).max() / np.abs(wide).max()
    assert error < (1e-5 if dtype == "float32" else 1e-2)
    assert np.any(right_slopes[1])
    assert not np.any(slopes[1])


@pytest.mark.parametrize("positions, dtype", [(1, "float32"), (3, "bfloat16"), (100, "float32")])
def test_scores_are_the_likelihood_and_whether_the_target_is_the_likeliest(positions, dtype):
    chunks = HeadChunks(positions * VOCABULARY * 6)
    hidden, head, targets = head_case(3, (6, 8), dtype)
    logits = np.asarray(jnp.matmul(hidden, head, preferred_element_type=jnp.float32), np.float64)
    # Half of the targets are the likeliest token.
    first = np.random.default_rng(0).integers(0, 2, targets.shape).astype(bool)
    targets = jnp.asarray(np.where(first, logits.argmax(axis=-1), targets), jnp.int32)
    nll, hits = jax.jit(token_scores, static_argnums=3)(hidden, head, targets, chunks)
    np.testing.assert_array_equal(hits, logits.argmax(axis=-1) == np.asarray(targets))
    own = np.take_along_axis(logits, np.asarray(targets)[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(nll, np.log(np.exp(logits).sum(axis=-1)) - own, rtol=1e-4, atol=1e-5)
    assert nll.dtype == hits.dtype == jnp.float32


def test_large_logits_give_a_finite_loss():
    hidden, head, targets = head_case(4, (2, 3), "float32")
    value, slope = jax.jit(
        jax.value_and_grad(lambda h: jnp.sum(frozen_head_nll(h, head, targets)))
    )(1e4 * hidden)
    assert np.isfinite(value)
    assert np.isfinite(slope).all()


# Company.


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_trained_together_are_those_trained_alone(kind):
    params, measured = together(kind)
    for n, adapter in enumerate(adapters_of(kind)):
        batches, keys = [only(batch, n) for batch in batches_of()], keys_of(MANY)[n : n + 1]
        alone, expected = train(kind, [adapter], batches, keys)
        for name in ("loss", "grad_norm"):
            np.testing.assert_allclose(measured[name][:, n], expected[name][:, 0], rtol=5e-4)
        assert_close(jax.tree.map(lambda leaf, n=n: leaf[n : n + 1], params), alone)


@pytest.mark.parametrize("kind", KINDS)
def test_every_factor_learns_and_the_measures_have_their_shapes(kind):
    params, measured = together(kind)
    shapes = {name: values.shape for name, values in measured.items()}
    assert shapes == {"loss": (STEPS, MANY), "grad_norm": (STEPS, MANY), "learning_rate": (STEPS,)}
    assert {values.dtype for values in measured.values()} == {np.dtype("float32")}
    expected = [1e-2 / (1 + n) for n in range(STEPS)]
    np.testing.assert_allclose(measured["learning_rate"], expected, rtol=1e-6)
    for found, before in pairs(params, stacked(adapters_of(kind))):
        assert np.all(np.abs(found - before).max(axis=-1).reshape(MANY, -1)[:, -1] > 1e-5)


def test_each_adapters_gradient_is_clipped_by_its_own_norm():
    """How far the first step goes under plain descent."""
    params, measured = train("hira", adapters_of("hira"), batches_of(1))
    norms = measured["grad_norm"][0]
    assert min(norms) < 0.95 * CLIP < 1.05 * CLIP < max(norms)
    squares = [np.square(a - b).reshape(MANY, -1).sum(axis=1) for a, b in
               pairs(params, stacked(adapters_of("hira")))]  # fmt: skip
    np.testing.assert_allclose(np.sqrt(sum(squares)), np.minimum(norms, CLIP), rtol=1e-3)


def test_a_frozen_component_stays_as_it_is_to_the_bit():
    """Weight decay, too, leaves it alone."""
    params, _ = together("flora")
    for found, before in pairs(params, stacked(adapters_of("flora"))):
        np.testing.assert_array_equal(found[:, :1], before[:, :1])
        assert np.all(np.any(found[:, 1:] != before[:, 1:], axis=-1))


def test_the_base_stays_as_it_is_to_the_bit_and_is_not_donated():
    before = jax.tree.map(np.array, model().params)
    train("lora", adapters_of("lora"), batches_of(2))
    for leaf, expected in pairs(model().params, before):
        assert not leaf.is_deleted()
        np.testing.assert_array_equal(leaf, expected)


def test_dropout_differs_between_steps_and_keys():
    batch = batches_of(1)[0]
    adapters = [adapters_of("lora")[0]] * MANY
    batch = jax.tree.map(lambda leaf: jnp.repeat(leaf[:, :1], MANY, axis=1), batch)
    _, measured = train("lora", adapters, [batch, batch])
    assert len(set(measured["loss"].reshape(-1).tolist())) == 2 * MANY


# How a step is computed.


@pytest.mark.parametrize(
    "options", [{"accumulate": 2, "remat": "products"}, {"accumulate": 4, "remat": "full"}]
)
def test_parts_and_recomputation_change_nothing(options):
    params, measured = together("flora")
    found, again = train("flora", adapters_of("flora"), batches_of(), **options)
    for name in measured:
        np.testing.assert_allclose(again[name], measured[name], rtol=5e-4)
    assert_close(found, params)


def test_rows_that_cannot_be_split_into_parts_are_an_error():
    with pytest.raises(ValueError, match="8 rows an adapter cannot be split into 3 equal parts"):
        train("ia3", adapters_of("ia3"), batches_of(1), accumulate=3)


def test_a_batch_with_nothing_to_predict_gives_no_gradient():
    (batch,) = batches_of(1)
    batch = batch._replace(mask=batch.mask.at[:, 0].set(0.0))
    adapters = adapters_of("lora")
    params, measured = train("lora", adapters, [batch])
    assert measured["loss"][0, 0] == measured["grad_norm"][0, 0] == 0
    assert min(measured["loss"][0, 1:]) > 1
    for found, before in pairs(params, stacked(adapters)):
        np.testing.assert_array_equal(found[0], before[0])


def test_a_base_in_bfloat16_trains_float32_factors():
    """Its losses follow those of the same numbers in float32."""
    half = model("bfloat16").params
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half)
    (params, found), (_, expected) = (
        train("flora", adapters_of("flora"), batches_of(), base=base) for base in (half, wide)
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}
    np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-2)
    np.testing.assert_allclose(found["grad_norm"], expected["grad_norm"], rtol=0.1)
    assert np.any(found["loss"] != expected["loss"])


@pytest.mark.parametrize("method", ["int8", "int4"])
def test_a_quantised_base_trains_as_its_weights_written_out_do(method):
    """Explicit weights on one target, so that their gradient goes through the base as well."""
    quantised = quantize_model(model(), method).params
    held = lambda leaf: isinstance(leaf, Quantized)  # noqa: E731
    written = jax.tree.map(
        lambda leaf: leaf.explicit() if held(leaf) else leaf, quantised, is_leaf=held
    )
    (params, found), (expected_params, expected) = (
        train("flora", adapters_of("flora"), batches_of(4), base=base)
        for base in (quantised, written)
    )
    np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-5)
    assert_close(params, expected_params)
    dense = train("flora", adapters_of("flora"), batches_of(1))[1]
    assert np.any(found["loss"][0] != dense["loss"][0])


# Rows and documents.


@functools.cache
def scorer():
    return make_scorer(model().graph)


def score(batch):
    """Of one adapter, as numbers."""
    layers = stacked(adapters_of("lora")[:1])
    return np.array([np.asarray(value)[0] for value in scorer()(layers, model().params, batch)])


def packed(*documents):
    starts = np.cumsum([0, *map(len, documents)])[:-1]
    tokens = np.concatenate(documents).astype(np.uint16)
    return PackedTokens(tokens, starts, tuple(map(str, range(len(documents)))), 1)


def windows(*documents, length=16):
    """All windows of the documents, as rows of one adapter, padded to two."""
    (batch,) = packed(*documents).evaluation(length, 2)
    return grouped([batch])


def random_document(seed, length):
    return np.random.default_rng(seed).integers(0, VOCABULARY, length)


@pytest.mark.parametrize("seed", range(3))
def test_documents_of_one_window_score_as_in_windows_of_their_own(seed):
    first, second = random_document(seed, 5 + seed), random_document(10 + seed, 9)
    both, alone = windows(first, second), [windows(document) for document in (first, second)]
    np.testing.assert_allclose(score(both), sum(map(score, alone)), rtol=1e-5)
    for number, own in enumerate(alone, 1):
        # The targets of one document alone.
        mask = both.mask * (both.segments == number).astype(jnp.float32)
        np.testing.assert_allclose(score(both._replace(mask=mask)), score(own), rtol=1e-5)
        assert score(own)[2] == (len(first), len(second))[number - 1] - 1


def test_what_is_masked_or_padding_does_not_matter():
    """Neither for the loss nor for the update: tokens behind the end, those of a document whose
    targets are masked, and a last target that is masked."""
    documents = [
        packed(*(random_document([n, m], 6) for m in range(12))).batch(0, ROWS, LENGTH, n)
        for n in range(MANY)
    ]
    batch = grouped(documents)
    tokens, mask = np.array(batch.tokens), np.array(batch.mask)
    hidden = np.isin(batch.segments, (0, 2))
    assert (np.asarray(batch.segments) == 0).any()
    mask[hidden] = 0
    mask[..., -1] = 0
    changed = tokens.copy()
    changed[..., :-1][hidden] += 1
    changed[..., -1] += 1
    changed %= VOCABULARY
    results = [
        train(
            "lora", adapters_of("lora"),
            [batch._replace(tokens=jnp.asarray(own), mask=jnp.asarray(mask))],
        )
        for own in (tokens, changed)
    ]  # fmt: skip
    (params, measured), (again, remeasured) = results
    for name in measured:
        np.testing.assert_allclose(measured[name], remeasured[name], rtol=1e-6)
    assert_close(again, params, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("adapted", [False, True])
def test_scores_are_sums_over_each_adapters_own_targets(adapted):
    many, adapters = 2, adapters_of("ia3")[:2]
    documents = [[random_document([n, m], 17) for m in range(2)] for n in range(many)]
    batch = grouped([next(packed(*own).evaluation(17, 3)) for own in documents])
    layers = stacked(adapters) if adapted else None
    nll, hits, count = scorer()(layers, model().params, batch)
    assert {value.dtype for value in (nll, hits, count)} == {jnp.dtype("float32")}
    np.testing.assert_array_equal(count, [32, 32])

    @jax.jit
    def forward(params, tokens, layers):
        return nnx.merge(model().graph, params)(tokens, adapters=layers)

    for n, adapter in enumerate(adapters):
        tokens = np.stack(documents[n])
        own_layers = adapter.layers if adapted else None
        inputs = jnp.asarray(tokens[:, :-1], jnp.int32)
        logits = np.asarray(forward(model().params, inputs, own_layers), np.float64)
        own = np.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
        expected = np.sum(np.log(np.exp(logits).sum(axis=-1)) - own)
        np.testing.assert_allclose(nll[n], expected, rtol=1e-5)
        assert int(hits[n]) == np.sum(logits.argmax(axis=-1) == tokens[:, 1:])
