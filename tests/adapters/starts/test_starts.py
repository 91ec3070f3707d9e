"""The starts of an adapter against what their papers ask of them; the base keeps its bytes under all of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from made import small_decoder, write_checkpoint
from safetensors.torch import load_file
from tolerances import assert_alike, assert_within, factored, rounding
from torch import Tensor, nn

from lorakit import (
    Linear4bit,
    LoraConfig,
    add_adapter,
    load_adapter,
    load_model,
    merge_adapter,
    quantize,
    remove_adapter,
    save_adapter,
)
from lorakit.adapters import adapter_configs, adapter_parameters, lora_layers, merge_checkpoint
from lorakit.adapters.starts import STARTS
from lorakit.errors import AdapterError, ConfigError

# Roundings through `model`: sums over 12 and 10 inputs and up to 6 ranks, tanh; a start added and taken away.
TERMS = 12 + 10 + 4 * 6 + 8
# Of a singular value or vector of a 12 x 10 matrix in fp32: a modest multiple of its size (Higham 2002, chapter 19).
FACTORED = 10 * 12


X = torch.randn(40, 12, generator=torch.Generator().manual_seed(0))


def model(kind: str = "dense") -> nn.Sequential:
    torch.manual_seed(0)
    first = nn.Linear(12, 10)
    if kind == "4bit":
        first = Linear4bit(quantize(first.weight.detach()), first.bias.detach())
    return nn.Sequential(first, nn.Tanh(), nn.Linear(10, 8, bias=False)).requires_grad_(False)


def gap(values: Tensor) -> Tensor:
    """Return the least distance between neighbours, by which an error of the matrix turns their directions."""
    return (values[:-1] - values[1:]).min()


def bytes_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def losses(module: nn.Module, batches: int = 2) -> Iterator[Tensor]:
    for part in X.chunk(batches):
        yield module(part).square().mean()


@pytest.mark.parametrize("kind", ["dense", "4bit"])
@pytest.mark.parametrize(
    "init", ["pissa", "pissa_niter_4", "milora", "olora", "lora_ga", "eva", "orthogonal", "gaussian"]
)
def test_no_start_changes_the_base_or_the_output(init: str, kind: str) -> None:
    net = model(kind)
    modules, before, expected = list(net), bytes_of(net), net(X)
    config = LoraConfig(r=2, lora_alpha=3, init_lora_weights=init)
    add_adapter(net, config, losses=losses(net) if init in ("eva", "lora_ga") else None)
    assert_alike(net(X), expected, TERMS)
    net(X).sum().backward()
    assert all(p.grad is not None for p in adapter_parameters(net))
    remove_adapter(net)
    assert list(net) == modules
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("init", ["pissa", "milora", "olora"])
def test_a_start_inside_the_base_is_written_as_plain_lora_of_twice_the_rank(
    init: str, rslora: bool, tmp_path: pytest.TempPathFactory
) -> None:
    net = model()
    config = LoraConfig(r=2, lora_alpha=3, init_lora_weights=init, use_rslora=rslora, rank_pattern={"2": 3})
    add_adapter(net, config)
    with torch.no_grad():
        for layer in lora_layers(net).values():
            for parameter in layer.parameters_of("default").values():
                parameter.add_(torch.randn_like(parameter))
    expected = net(X)
    save_adapter(net, tmp_path / "adapter")
    other = model()
    report = load_adapter(other, tmp_path / "adapter")
    assert report.ranks == {"0": 4, "2": 6}
    assert_alike(other(X), expected, TERMS)
    for path, layer in lora_layers(other).items():
        assert_alike(layer.delta_weight("default"), lora_layers(net)[path].delta_weight("default"), TERMS)


def test_pissa_is_the_best_approximation_of_the_base() -> None:
    net = model()
    add_adapter(net, LoraConfig(r=3, lora_alpha=7, init_lora_weights="pissa"))
    layer = lora_layers(net)["0"]
    start = layer.scaling["default"] * layer.lora_B["default"] @ layer.lora_A["default"]
    weight = layer.base_weight(torch.float32)
    values = torch.linalg.svdvals(weight)
    bound = rounding(FACTORED, values[0])
    assert_within(torch.linalg.svdvals(weight - start)[:-3], values[3:], bound)
    assert_alike(layer.lora_A["default"].norm(dim=1), layer.lora_B["default"].norm(dim=0), FACTORED)
    assert_within(layer.delta_weight("default"), torch.zeros(10, 12), rounding(TERMS, values[0]))


@pytest.mark.parametrize("kind", ["dense", "4bit"])
@pytest.mark.parametrize(("alpha", "r"), [(4, 4), (7, 3), (16, 2)])
def test_milora_is_what_the_minor_directions_hold(alpha: int, r: int, kind: str) -> None:
    """Against the definition in float64: W_m is W without its best approximation of rank min(out, in) - r."""
    net = model(kind)
    add_adapter(net, LoraConfig(r=r, lora_alpha=alpha, init_lora_weights="milora"))
    for layer in lora_layers(net).values():
        lora_a, lora_b = layer.lora_A["default"].double(), layer.lora_B["default"].double()
        weight = layer.base_weight(torch.float64)
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        minor = weight - u[:, :-r] * s[:-r] @ vh[:-r]
        # A decomposition in fp32 is that of W + E with |E| of some n eps |W|; E turns the two subspaces against each
        # other by |E| over the gap of singular values between them (Davis and Kahan), which moves W_m by that of |W|.
        error = max(weight.shape) * torch.finfo(torch.float32).eps * float(s[0])
        bound = error * (1 + float(s[0] / (s[-r - 1] - s[-r])))
        assert_within(layer.scaling["default"] * lora_b @ lora_a, minor, bound)
        norms = lora_b.norm(dim=0)
        assert_within(lora_a.norm(dim=1), norms, rounding(FACTORED, norms))
        assert_within(layer.delta_weight("default"), torch.zeros_like(weight), rounding(TERMS, s[0]))


def test_milora_needs_a_weight_of_full_rank() -> None:
    """Directions of length zero would give A = 0 and B = 0, which no step ever moves."""
    net = model()
    net[2].weight.data[-3:] = 0
    add_adapter(net, LoraConfig(r=4, init_lora_weights="milora"))
    remove_adapter(net)
    with pytest.raises(AdapterError, match=r"'milora' at rank 3.*rank 5"):
        add_adapter(net, LoraConfig(r=3, init_lora_weights="milora"))


def test_olora_has_an_orthonormal_b() -> None:
    net = model()
    add_adapter(net, LoraConfig(r=3, init_lora_weights="olora"))
    lora_b = lora_layers(net)["0"].lora_B["default"]
    assert_alike(lora_b.T @ lora_b, torch.eye(3), FACTORED)


@pytest.mark.parametrize(("alpha", "r"), [(2, 2), (16, 2), (1, 4)])
def test_loftq_is_right_for_every_alpha(alpha: int, r: int) -> None:
    """PEFT's factors are not divided by the scaling, so that theirs is right where alpha is r."""
    source, net = model(), model("4bit")
    sources = source.state_dict()
    add_adapter(net, LoraConfig(r=r, lora_alpha=alpha, init_lora_weights="loftq"), sources=sources)
    layer = lora_layers(net)["0"]
    lost = sources["0.weight"] - layer.base_weight(torch.float32)
    left = (lost - layer.delta_weight("default")).norm()
    assert_within(left, torch.linalg.svdvals(lost)[r:].norm(), rounding(FACTORED, lost.norm()))
    assert left < lost.norm()


def test_loftq_is_not_merged_onto_weights_that_were_not_quantized(tmp_path: Path) -> None:
    """Its file says so: the adapter holds what quantization lost, which a 16-bit base has already."""
    folder = write_checkpoint(tmp_path / "base", small_decoder())
    net = load_model(folder, quant_type="nf4", dtype=torch.float32)
    sources = load_file(folder / "model.safetensors")
    config = LoraConfig(r=4, init_lora_weights="loftq", target_modules=["q_proj", "up_proj"])
    add_adapter(net, config, sources=sources)
    ids = torch.tensor([[5, 17, 300, 2, 41]])
    expected = net(ids)
    saved = save_adapter(net, tmp_path / "adapter")
    other = load_model(folder, quant_type="nf4", dtype=torch.float32)
    load_adapter(other, saved)
    again = save_adapter(other, tmp_path / "again")
    assert [file.read_bytes() for file in sorted(again.iterdir())] == [f.read_bytes() for f in sorted(saved.iterdir())]
    assert torch.equal(other(ids), expected)
    report = merge_adapter(other)
    assert "'loftq' starts at the error of quantizing it" in str(report)
    assert all(layer.how == "dequantized + update" for layer in report.layers)
    with pytest.raises(AdapterError, match="'loftq' starts at the error of quantizing the base"):
        merge_checkpoint(again, tmp_path / "merged", base=folder)
    assert not (tmp_path / "merged").exists()


def test_eva_finds_the_directions_of_the_inputs() -> None:
    net = model()
    add_adapter(net, LoraConfig(r=3, init_lora_weights="eva"), losses=losses(net))
    layer = lora_layers(net)["0"]
    lora_a = layer.lora_A["default"]
    _, s, vh = torch.linalg.svd(X.double(), full_matrices=False)
    assert_alike(lora_a @ lora_a.T, torch.eye(3), FACTORED)
    # They are those of XᵀX, a sum over the rows, whose values are squares.
    angle = rounding(len(X) + factored(12, 12), s[0] ** 2) / gap(s[:4] ** 2)
    assert_within((lora_a.double() @ vh[:3].T).abs(), torch.eye(3), angle + rounding(FACTORED, 1.0))
    assert not layer.lora_B["default"].any()


@pytest.mark.parametrize("kind", ["dense", "4bit"])
def test_lora_ga_starts_in_the_directions_of_the_gradient(kind: str) -> None:
    net = model(kind)
    dense = model()
    if kind == "4bit":
        dense[0].weight.data = net[0].dense_weight(torch.float32)
    dense.requires_grad_(True)
    for loss in losses(dense):
        loss.backward()
    torch.manual_seed(0)
    add_adapter(net, LoraConfig(r=2, lora_alpha=4, init_lora_weights="lora_ga"), losses=losses(net))
    for path in ("0", "2"):
        layer, gradient = lora_layers(net)[path], dense.get_submodule(path).weight.grad
        u, s, vh = torch.linalg.svd(gradient.double(), full_matrices=False)
        size = layer.out_features**0.25 / (16 * 2) ** 0.5
        # Of the gradients, sums over the rows, and of their decomposition; and what four power iterations leave of the
        # directions beyond the eight that are sought.
        angle = rounding(3 * TERMS + len(X) + factored(*gradient.shape), s[0]) / gap(s[:5])
        angle = angle + sum((float(value / s[3]) ** 9 for value in s[8:]), 0.0)
        bound = size * (2 * angle + rounding(FACTORED, 1.0))
        assert_within((u[:, :2].T @ layer.lora_B["default"].double()).abs(), size * torch.eye(2), bound)
        assert_within((layer.lora_A["default"].double() @ vh[2:4].T).abs(), size * torch.eye(2), bound)
    assert all(p.grad is None for p in net.parameters())


def test_orthogonal_halves() -> None:
    net = model()
    add_adapter(net, LoraConfig(r=4, init_lora_weights="orthogonal"))
    for layer in lora_layers(net).values():
        lora_a, lora_b = layer.lora_A["default"], layer.lora_B["default"]
        assert_within(
            lora_b @ lora_a, torch.zeros(len(lora_b), lora_a.shape[1]), rounding(TERMS, lora_b.norm() * lora_a.norm())
        )
        assert lora_a.any() and lora_b.any()


def test_every_start_is_explained_to_users() -> None:
    page = (Path(__file__).parents[3] / "docs/how-to/adapters.md").read_text(encoding="utf-8")
    description = LoraConfig.model_fields["init_lora_weights"].description or ""
    for name, start in STARTS.items():
        assert start.name == name
        is_word = isinstance(name, str)
        assert (f'| `"{name}"`' if is_word else f"| `{name}` |") in page
        assert (f"'{name}'" if is_word else f"{str(name).lower()}: ") in description


class TestRefusals:
    def test_an_unknown_start(self) -> None:
        with pytest.raises(ConfigError, match=r"'pisa' is not a start; did you mean 'pissa'\? .*pissa_niter_N"):
            LoraConfig(init_lora_weights="pisa")
        with pytest.raises(ConfigError, match="'pissa_niter_0' is not a start"):
            LoraConfig(init_lora_weights="pissa_niter_0")
        assert LoraConfig(init_lora_weights="PiSSA_niter_16").init_lora_weights == "pissa_niter_16"

    @pytest.mark.parametrize(("text", "value"), [("true", True), ("False", False)])
    def test_a_quoted_true_or_false_is_meant(self, text: str, value: bool) -> None:
        assert LoraConfig(init_lora_weights=text).init_lora_weights is value

    def refused(self, config: LoraConfig, **given: object) -> str:
        net = model()
        modules, before = list(net), bytes_of(net)
        trained = [p.requires_grad for p in net.parameters()]
        given = {key: value(net) if callable(value) else value for key, value in given.items()}
        with pytest.raises(AdapterError) as caught:
            add_adapter(net, config, **given)
        assert list(net) == modules and not adapter_configs(net)
        assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
        assert [p.requires_grad for p in net.parameters()] == trained
        return str(caught.value)

    def test_data_that_is_missing_or_not_wanted(self) -> None:
        assert "needs `losses`" in self.refused(LoraConfig(init_lora_weights="eva"))
        assert "needs `sources`" in self.refused(LoraConfig(init_lora_weights="loftq"))
        assert "makes no use of them" in self.refused(LoraConfig(), losses=losses)
        assert "no '0.weight'" in self.refused(LoraConfig(init_lora_weights="loftq"), sources={})

    def test_too_little_to_start_from(self) -> None:
        assert "rank 9" in self.refused(LoraConfig(r=9, init_lora_weights="pissa"))
        assert "choose an even one" in self.refused(LoraConfig(r=3, init_lora_weights="orthogonal"))
        assert "needs 10 directions" in self.refused(LoraConfig(r=5, init_lora_weights="lora_ga"), losses=losses)
        assert "saw 0" in self.refused(LoraConfig(r=2, init_lora_weights="eva"), losses=[])
        assert "saw no gradient" in self.refused(LoraConfig(r=2, init_lora_weights="lora_ga"), losses=[])
        wrong = {"0.weight": torch.zeros(3, 3)}
        assert "is no source of" in self.refused(LoraConfig(r=2, init_lora_weights="loftq"), sources=wrong)

    def test_a_start_inside_the_base_with_dora(self) -> None:
        with pytest.raises(ConfigError, match="exclude each other"):
            LoraConfig(init_lora_weights="pissa", use_dora=True)
