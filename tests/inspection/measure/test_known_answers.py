"""Adapters made so that the answer is known: each planted thing is found, and named in the findings."""

import pytest
import torch
from made_adapters import gaussian, orthonormal, write_adapter, write_base
from safetensors.torch import load_file, save_file
from tolerances import assert_within, rounding

from lorakit.errors import AdapterError, CheckpointError
from lorakit.inspection import inspect_adapter

LAYERS = 8
PATHS = [f"model.layers.{n}.self_attn.{module}" for n in range(LAYERS) for module in ("q_proj", "o_proj")]


def plain(seed=0, out=40, into=32, rank=8):
    return {path: gaussian(out, into, rank, seed + number) for number, path in enumerate(PATHS)}


def said(info, *words):
    """The one finding that has all these words in it."""
    (found,) = [finding for finding in info.findings if all(word in finding for word in words)]
    return found


def test_a_planted_rank(tmp_path):
    factors = plain()
    path = "model.layers.5.self_attn.o_proj"
    b, _ = factors[path]
    b[:, 2:] = b[:, :2] @ torch.randn(2, 6)
    info = inspect_adapter(write_adapter(tmp_path / "a", factors))
    by_name = {layer.name: layer for layer in info.layers}
    assert by_name[path].numerical_rank == 2
    assert f"{path} (2 of 8)" in said(info, "lower rank than was allotted")


def test_the_rank_that_is_enough(tmp_path):
    left, right = orthonormal(64, 8), orthonormal(48, 8, 1)
    values = torch.tensor([10.0, 9, 8, 7, 0.3, 0.2, 0.1, 0.1])
    factors = {path: ((left * values).float(), right.T.float()) for path in PATHS}
    info = inspect_adapter(write_adapter(tmp_path / "a", factors))
    kept = float(values[:4].square().sum() / values.square().sum())
    assert info.energy(4) == pytest.approx(kept, rel=float(rounding(4, 2.0)))  # the factors are rounded to fp32
    assert "r=4 would keep 99.9%" in said(info, "rank 8 allotted, 4.4 used")


def test_dead_and_nearly_dead_layers(tmp_path):
    factors = plain()
    dead, weak = PATHS[3], PATHS[6]
    factors[dead] = (torch.zeros_like(factors[dead][0]), factors[dead][1])
    factors[weak] = (factors[weak][0] * 1e-4, factors[weak][1])
    info = inspect_adapter(write_adapter(tmp_path / "a", factors))
    assert [layer.name for layer in info.layers if layer.dead] == [dead]
    assert said(info, "1 of 16 layers are dead").endswith(dead)
    assert weak in said(info, "changed by less than 1%")
    zero = {path: (torch.zeros_like(b), a) for path, (b, a) in factors.items()}
    info = inspect_adapter(write_adapter(tmp_path / "z", zero))
    assert info.findings == ("every update is exactly zero: the adapter of 16 layers changes nothing",)
    assert info.norm == 0 and info.energy(1) == 1


def test_dead_units_and_directions(tmp_path):
    factors = plain()
    b, a = factors[PATHS[0]]
    b[5:9] = 0
    a[:, 0] = 0
    a[7] = 0
    info = inspect_adapter(write_adapter(tmp_path / "a", factors))
    found = {layer.name: (layer.dead_outputs, layer.dead_inputs, layer.dead_directions) for layer in info.layers}
    assert found == dict.fromkeys(PATHS, (0, 0, 0)) | {PATHS[0]: (4, 1, 1)}
    assert f"{PATHS[0]} (4)" in said(info, "4 output units")
    assert f"{PATHS[0]} (1)" in said(info, "1 of the r directions")


def test_where_the_update_is(tmp_path):
    factors = plain()
    for number in (5, 6):
        path = f"model.layers.{number}.self_attn.o_proj"
        factors[path] = (factors[path][0] * 10, factors[path][1])
    info = inspect_adapter(write_adapter(tmp_path / "a", factors))
    layers = [layer for layer in info.layers if layer.name.endswith("o_proj") and layer.index in (5, 6)]
    share = sum(layer.norm**2 for layer in layers) / sum(layer.norm**2 for layer in info.layers)
    assert f"layers 5-6 o_proj hold {share:.0%} of the update with 12% of its parameters" in info.findings


def test_a_planted_intruder_dimension(tmp_path):
    weights, factors = {}, {}
    for number, path in enumerate(PATHS):
        u, v = orthonormal(40, 32, number), orthonormal(32, 32, 100 + number)
        s = torch.linspace(8, 1, 32, dtype=torch.float64)
        weights[path] = ((u * s) @ v.T).float()
        b, a = gaussian(40, 32, 4, number)
        factors[path] = (b * 1e-3, a)
    outside = orthonormal(40, 40, 3)
    new = outside[:, 0] - torch.linalg.svd(weights[PATHS[3]].double())[0][:, :32] @ (
        torch.linalg.svd(weights[PATHS[3]].double())[0][:, :32].T @ outside[:, 0]
    )
    b, a = factors[PATHS[3]]
    b[:, 0], a[0] = (20 * new / new.norm()).float(), torch.randn(32) / 32**0.5
    base = write_base(tmp_path / "base", weights)
    info = inspect_adapter(write_adapter(tmp_path / "a", factors), base=base)
    found = {layer.name: layer.base.intruders for layer in info.layers if layer.base.intruders}
    assert found == {PATHS[3]: (0,)}
    assert "1 intruder dimensions" in said(info, "in 1 of 16 layers", PATHS[3])
    b[:, 0] *= 1e-5
    info = inspect_adapter(write_adapter(tmp_path / "b", factors), base=base)
    said(info, "no intruder dimension")


def test_a_planted_shared_subspace(tmp_path):
    out, into = 60, 50
    one, two = {}, {}
    for number, path in enumerate(PATHS):
        ub, ua = orthonormal(out, 11, number), orthonormal(into, 11, 50 + number)
        shared = 3 if number == 4 else 0
        theirs = [*range(shared), *range(6, 11 - shared)]
        one[path] = (ub[:, :5].float(), ua[:, :5].T.float())
        two[path] = (ub[:, theirs].float(), ua[:, theirs].T.float())
    a, b = write_adapter(tmp_path / "a", one), write_adapter(tmp_path / "b", two)
    info = inspect_adapter(a, vs=b)
    assert {layer.name: layer.shared for layer in info.comparison.layers if layer.shared} == {PATHS[4]: 3}
    assert f"{PATHS[4]} (3)" in said(info, "3 directions are shared")
    assert [layer.name for layer in info.other.layers] == [layer.name for layer in info.layers]
    said(inspect_adapter(a, vs=a), "the updates of the first and the second are equal in all 16 layers")


def in_one_embedding(tmp_path, name, b, a):
    """Write an adapter of an embedding, (dim, r) and (r, vocab), and of nothing else."""
    factors = write_adapter(tmp_path / name, {"embed_tokens": (b, a)})
    file = factors / "adapter_model.safetensors"
    tensors = {
        key.replace("lora_A.weight", "lora_embedding_A").replace("lora_B.weight", "lora_embedding_B"): tensor
        for key, tensor in load_file(file).items()
    }
    save_file(tensors, file)
    return factors


def test_runs_of_one_seed_are_not_called_alike(tmp_path):
    """Both keep the A they began with, nearly; their B have nothing in common."""
    one, two, other = {}, {}, {}
    for number, path in enumerate(PATHS):
        drawn = torch.randn(4, 32, generator=torch.Generator().manual_seed(number))
        for factors, seed in ((one, 100), (two, 200), (other, 300)):
            b, moved = gaussian(40, 32, 4, seed + number)
            own = torch.randn(4, 32, generator=torch.Generator().manual_seed(seed + number))
            factors[path] = (b, (own if factors is other else drawn) + 0.05 * moved)
    a, b, c = (write_adapter(tmp_path / name / "adapter", f) for name, f in (("a", one), ("b", two), ("c", other)))
    alike = inspect_adapter(a, vs=b)
    assert all(layer.same_start and layer.similarity > 0.9 for layer in alike.comparison.layers)
    middle = sorted(layer.learned_similarity for layer in alike.comparison.layers)[8]
    assert middle < 0.3
    finding = said(alike, "in 16 of 16 layers both began with the same A", "overlap by", "judge by these")
    assert alike.findings.index(finding) < 3
    assert said(alike, "a/adapter: rank 4 allotted") and said(alike, "b/adapter: rank 4 allotted")
    assert "between a/adapter and b/adapter" in said(alike, "cosine")
    apart = inspect_adapter(a, vs=c)
    assert not any(layer.same_start for layer in apart.comparison.layers)
    said(apart, "leading input subspaces overlap by")
    assert not any("began with the same" in finding for finding in apart.findings)


def test_of_an_embedding_the_start_draws_b(tmp_path):
    drawn, (_, first), (_, second) = gaussian(24, 50, 4)[0], gaussian(24, 50, 4, 1), gaussian(24, 50, 4, 2)
    a, b = in_one_embedding(tmp_path, "a", drawn, first), in_one_embedding(tmp_path, "b", drawn, second)
    (layer,) = inspect_adapter(a, vs=b).comparison.layers
    assert layer.is_embedding and layer.same_start
    assert layer.learned_chance == layer.chance and layer.learned_similarity == layer.similarity < 0.5


def test_what_does_not_belong_together(tmp_path):
    factors = plain()
    a = write_adapter(tmp_path / "a", factors)
    b = write_adapter(tmp_path / "b", {"other.proj": gaussian(4, 4, 2)})
    with pytest.raises(AdapterError, match="adapts none of the 16 layers"):
        inspect_adapter(a, vs=b)
    with pytest.raises(AdapterError, match="probably of different base models"):
        inspect_adapter(a, vs=write_adapter(tmp_path / "c", plain(out=41)))
    with pytest.raises(CheckpointError, match="not the adapter's base model"):
        inspect_adapter(a, base=write_base(tmp_path / "base", {path: torch.randn(41, 32) for path in PATHS}))
    with pytest.raises(CheckpointError, match=r"there is no weight of model\.layers\.0\.self_attn\.q_proj"):
        inspect_adapter(a, base=write_base(tmp_path / "base2", {"x": torch.randn(4, 4)}))


def test_names_of_checkpoints_differ_and_heads_are_tied(tmp_path):
    weights = {"layers.0.q_proj": torch.randn(40, 32), "model.embed_tokens": torch.randn(50, 32)}
    base = write_base(tmp_path / "base", weights)
    (base / "config.json").write_text('{"tie_word_embeddings": true}')
    adapter = write_adapter(
        tmp_path / "a", {"model.layers.0.q_proj": gaussian(40, 32, 4), "lm_head": gaussian(50, 32, 4, 1)}
    )
    layers = {layer.name: layer for layer in inspect_adapter(adapter, base=base).layers}
    for path, name in (("model.layers.0.q_proj", "layers.0.q_proj"), ("lm_head", "model.embed_tokens")):
        norm = float(weights[name].double().norm())
        assert_within(layers[path].base.base_norm, norm, rounding(50 * 32, norm, torch.float64))


@pytest.mark.parametrize("shape", [(1100, 1060), (1060, 1100)])
def test_weights_too_large_for_all_singular_vectors(shape, tmp_path, monkeypatch):
    """A planted spectrum: the leading vectors are found within the bound, and found again in the cache."""
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    u, v = orthonormal(shape[0], 1060), orthonormal(shape[1], 1060, 1)
    s = torch.cat([torch.linspace(100, 40, 80), torch.linspace(2, 1, 980)]).double()
    weight = ((u * s) @ v.T).float()
    b, a = u[:, :4] * 30, v[:, :4].T
    b[:, 0] = u[:, 1000] * 300  # takes the leading place: of the base's 64 leading directions it is none
    base = write_base(tmp_path / "base", {"q_proj": weight})
    (layer,) = inspect_adapter(write_adapter(tmp_path / "a", {"q_proj": (b.float(), a.float())}), base=base).layers
    assert not layer.base.svd_complete and 0 <= layer.base.svd_error < 1e-4
    # The weight is the planted one rounded to fp32; a direction turns by an error over the distance of its neighbours.
    error = layer.base.svd_error + rounding(1, weight.norm())
    turn = error / (s[0] - s[1]) + rounding(3, 1.0)
    assert_within(layer.base.base_spectral_norm, 100.0, error)
    assert layer.base.intruders == (0,)
    assert_within(layer.base.alignment_in, 1.0, 2 * turn)
    assert_within(layer.base.alignment_out, 3 * 30**2 / (3 * 30**2 + 300**2), 2 * turn)
    (file,) = (tmp_path / "cache" / "singular-vectors").iterdir()
    (again,) = inspect_adapter(tmp_path / "a", base=base).layers
    assert_within(again.base.alignment_out, layer.base.alignment_out, rounding(2, 1.0))  # kept in fp32
    file.write_bytes(file.read_bytes()[:100])
    (again,) = inspect_adapter(tmp_path / "a", base=base).layers
    assert again.base == layer.base
