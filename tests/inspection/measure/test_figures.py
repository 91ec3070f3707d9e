"""Every figure against its dense definition: B A multiplied out, a full SVD, float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_adapters import gaussian, orthonormal
from tolerances import THROUGH_CHOLESKY, factored, rounding

from lorakit.adapters.combining.ranks import rank_for_energy
from lorakit.adapters.low_rank import LowRank
from lorakit.inspection.compare.interference import principal_angles
from lorakit.inspection.compare.similarity import compare_updates, subspace_similarity
from lorakit.inspection.measure.against_base import compare_with_base
from lorakit.inspection.measure.layer_info import measure_update
from lorakit.inspection.measure.module_paths import ModulePath
from lorakit.inspection.measure.singular_vectors import complete_vectors
from lorakit.inspection.measure.spectrum import effective_rank, energy, noise_rank, stable_rank
from lorakit.inspection.measure.updates import LayerUpdate

PLACE = ModulePath("model.layers", 3, "q_proj")
# Relative, in float64: of decompositions of matrices of at most 24 x 24.
EXACT = float(THROUGH_CHOLESKY * rounding(factored(24, 24), 1.0, torch.float64))


def near(value, expected, scale=1.0):
    return math.isclose(value, float(expected), rel_tol=EXACT, abs_tol=EXACT * float(scale))


@st.composite
def factors(draw, most=24):
    """B (out, r) and A (r, in), some of them of lower rank, zero in parts, or zero."""
    out, into, rank = draw(st.integers(1, most)), draw(st.integers(1, most)), draw(st.integers(1, 12))
    b, a = gaussian(out, into, rank, draw(st.integers(0, 1000)))
    size = 10.0 ** draw(st.integers(-4, 3))
    flaw = draw(st.sampled_from(["none", "rank", "zero B", "zero rows", "zero columns", "zero directions", "same"]))
    if flaw == "rank":
        b[:, rank // 2 :] = b[:, :1] * 2
    elif flaw == "zero B":
        b.zero_()
    elif flaw == "zero rows":
        b[: out // 2] = 0
    elif flaw == "zero columns":
        a[:, into // 2 :] = 0
    elif flaw == "zero directions":
        a[::2] = 0
        b[:, rank - 1] = 0
    elif flaw == "same":
        a[:] = a[:1]
    return b * size, a


def update_of(b, a, scaling=1.0, magnitude=None):
    low_rank = LowRank(b.double() * scaling, a.double())
    return LayerUpdate("m.q_proj", "m.q_proj", "linear", len(a), scaling, a.numel() + b.numel(), low_rank, magnitude)


@settings(max_examples=150, deadline=None)
@given(factors(), st.sampled_from([1.0, 0.25, 2.0]))
def test_spectra_norms_and_dead_parts(pair, scaling):
    b, a = pair
    layer = measure_update(update_of(b, a, scaling), PLACE)
    dense = scaling * b.double() @ a.double()
    s = torch.linalg.svdvals(dense)
    top = float(s[0])
    found = torch.zeros_like(s)
    found[: len(layer.singular_values)] = layer.spectrum
    assert all(near(value, expected, top) for value, expected in zip(found.tolist(), s.tolist(), strict=True))
    assert near(layer.norm, torch.linalg.matrix_norm(dense))
    assert near(layer.spectral_norm, torch.linalg.matrix_norm(dense, 2))
    assert near(layer.nuclear_norm, torch.linalg.matrix_norm(dense, "nuc"), top)
    assert near(layer.norm_a, a.double().norm()) and near(layer.norm_b, b.double().norm())
    assert layer.dead == (top == 0)
    zero = dense == 0
    assert near(layer.sparsity, zero.double().mean())
    if not layer.dead:
        assert layer.dead_outputs == int(zero.all(1).sum()) and layer.dead_inputs == int(zero.all(0).sum())
        assert near(layer.stable_rank, dense.square().sum() / top**2)
        assert layer.numerical_rank == int((s > 1e-6 * top).sum())
        share = s / s.sum()
        share = share[share > 1e-14]  # a dense SVD returns rounding where we have zero or nothing
        assert near(layer.effective_rank, torch.exp(-(share * share.log()).sum()))
        for k in range(1, len(a) + 1):
            assert near(layer.energy(k), s[:k].square().sum() / s.square().sum())
            u, values, vh = torch.linalg.svd(dense, full_matrices=False)
            kept = (u[:, :k] * values[:k]) @ vh[:k]
            assert near(1 - layer.energy(k), (dense - kept).square().sum() / dense.square().sum())
    assert layer.dead_directions == sum(not torch.outer(b[:, i], a[i]).any() for i in range(len(a)))


@settings(max_examples=60, deadline=None)
@given(factors(), st.integers(0, 1000), st.booleans())
def test_against_the_base(pair, seed, is_dora):
    b, a = pair
    out, into = b.shape[0], a.shape[1]
    weight = (
        gaussian(out, into, max(out, into), seed)[0]
        @ gaussian(max(out, into), into, max(out, into), seed + 1)[0][:, :into]
    )
    weight = weight[:out, :into].contiguous()
    magnitude = (
        torch.rand(out, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.5 if is_dora else None
    )
    update = update_of(b, a).low_rank
    found = compare_with_base(update, weight, complete_vectors(weight), magnitude)
    w, delta = weight.double(), b.double() @ a.double()
    tuned = w + delta
    if is_dora:
        tuned = magnitude[:, None] * tuned / tuned.norm(dim=1, keepdim=True)
    u0, s0, vh0 = torch.linalg.svd(w, full_matrices=False)
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    rank = int((s > 1e-6 * s[0]).sum())
    assert near(found.base_norm, w.norm()) and near(found.base_spectral_norm, s0[0])
    scale = max(1.0, float(s[0] / s0[0]))
    assert near(found.relative_norm, (tuned - w).norm() / w.norm(), scale)
    assert near(found.relative_spectral_norm, s[0] / s0[0])
    if rank:
        along = (u[:, :rank].T @ w @ vh[:rank].T).norm()
        assert near(found.amplification, delta.norm() / along)
        assert near(found.alignment_out, (u0[:, :rank].T @ delta).norm() ** 2 / delta.norm() ** 2)
        assert near(found.alignment_in, (delta @ vh0[:rank].T).norm() ** 2 / delta.norm() ** 2)
    else:
        assert found.amplification is None
    before, after = w.norm(dim=1), tuned.norm(dim=1)
    assert near(found.magnitude_change, ((after - before).abs() / before).mean())
    cosine = torch.nn.functional.cosine_similarity(tuned, w, dim=1)
    assert near(found.direction_change, (1 - cosine).mean())
    ut, st_, _ = torch.linalg.svd(tuned, full_matrices=False)
    count = len(found.tuned_values)
    assert all(
        near(value, expected, st_[0]) for value, expected in zip(found.tuned_values, st_[:count].tolist(), strict=True)
    )
    gaps = (st_[:count, None] - st_[None]).abs() + torch.eye(len(st_))[:count] * st_[0]
    separate = gaps.min(1).values > 1e-3 * st_[0]  # singular vectors of values that coincide are not defined
    expected = (u0.T @ ut[:, :count]).abs().amax(0)
    gap0 = ((s0[:, None] - s0[None]).abs() + torch.eye(len(s0)) * s0[0]).min() > 1e-4 * s0[0] and s0[-1] > 1e-4 * s0[0]
    for place in range(count):
        if separate[place] and gap0:
            # An error turns directions by that over the gaps, which are at least these shares of the largest values.
            bound = 2 * EXACT * (1 / 1e-3 + 1 / 1e-4)
            assert math.isclose(found.tuned_cosines[place], float(expected[place]), rel_tol=0, abs_tol=bound)


@settings(max_examples=60, deadline=None)
@given(factors(), factors())
def test_two_updates(first, second):
    (b1, a1), (b2, a2) = first, second
    out, into = min(len(b1), len(b2)), min(a1.shape[1], a2.shape[1])
    one, two = (LowRank(b[:out].double(), a[:, :into].double()) for b, a in (first, second))
    found = compare_updates("q", one, two)
    d1, d2 = one.dense(), two.dense()
    scale = float(torch.maximum(d1.norm(), d2.norm()))
    assert near(found.meeting.norms[0], d1.norm(), scale) and near(found.meeting.norms[1], d2.norm(), scale)
    assert near(found.difference, (d1 - d2).norm(), scale)
    if d1.norm() and d2.norm():
        assert near(found.cosine, (d1 * d2).sum() / (d1.norm() * d2.norm()))
    else:
        assert found.cosine == 0
    same = compare_updates("q", one, one)
    if d1.norm():
        assert near(same.cosine, 1) and near(same.similarity, 1) and same.difference <= EXACT * same.meeting.norms[0]


@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_subspace_similarity_is_the_papers_formula(p, q, seed):
    a, b = orthonormal(20, p, seed), orthonormal(20, q, seed + 1)
    phi = subspace_similarity(a, b)
    for i in range(1, p + 1):
        for j in range(1, q + 1):
            assert near(phi[i - 1, j - 1], (a[:, :i].T @ b[:, :j]).norm() ** 2 / min(i, j))
    angles = principal_angles(a, b)
    assert near(phi[-1, -1] * min(p, q), sum(math.cos(angle) ** 2 for angle in angles))


def test_random_subspaces_overlap_by_chance():
    values = [
        float(subspace_similarity(orthonormal(200, 8, s), orthonormal(200, 20, s + 500))[-1, -1]) for s in range(50)
    ]
    assert sum(values) / len(values) == pytest.approx(20 / 200, rel=0.05)


def test_ranks_of_simple_spectra():
    flat = torch.ones(8, dtype=torch.float64)
    assert effective_rank(flat) == pytest.approx(8, rel=EXACT) and stable_rank(flat) == 8
    assert rank_for_energy(flat, 0.5) == 4 and rank_for_energy(flat, 0.51) == 5 and energy(flat, 2) == 0.25
    zero = torch.zeros(4, dtype=torch.float64)
    assert effective_rank(zero) == stable_rank(zero) == rank_for_energy(zero, 0.99) == noise_rank(zero, 9) == 0
    assert energy(zero, 2) == 1


@pytest.mark.parametrize(("out", "k"), [(400, 16), (1000, 64), (150, 150)])
def test_noise_alone_has_rank_zero_and_planted_directions_are_counted(out, k):
    found = []
    for seed in range(40):
        core, _ = gaussian(out, 1, k, seed, torch.float64)
        found.append(noise_rank(torch.linalg.svdvals(core), out))
    assert sum(map(bool, found)) <= 6  # one in a hundred is expected, and the noise's level is an estimate
    strong = 4 * math.sqrt(out) * orthonormal(out, 3) @ orthonormal(k, 3, 1).T
    assert noise_rank(torch.linalg.svdvals(core + strong), out) == 3
