"""Probes look on: the run is the same to the bit, the figures are those of the definitions, a kill leaves the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from probed import BINS, CLOSE, CONVERSATIONS, config, dropping, weights
from tolerances import SMALL_DECODER, THROUGH_CHOLESKY, assert_within, factored, rounding
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lorakit import Decoder, LoraConfig, Tokenizer, add_adapter, train
from lorakit.adapters import adapter_parameters, disable_adapters, lora_layers, set_adapter, set_trained
from lorakit.data import encode_records
from lorakit.inspection.probes import (
    ProbeLog,
    Probes,
    estimate_noise,
    linear_cka,
    noise_scale,
    relative_drift,
)
from lorakit.inspection.probes.matrices import Adapted
from lorakit.layers import AdapterSpec
from lorakit.layers.lora_parameter import LoRAParameter
from lorakit.training import TrainingProbe
from lorakit.training.trainer import accumulate_gradients

# Relative bounds: of figures in float64, from decompositions; of a norm in fp32, the root of a sum of at most 4 x 48
# squares; of a loss.
EXACT = float(THROUGH_CHOLESKY * rounding(factored(48, 4), 1.0, torch.float64))
OF_NORM = float(rounding(4 * 48 // 2 + 2, 1.0))
OF_LOSS = float(rounding(SMALL_DECODER, 1.0))
WRITTEN = 0.5e-8  # nine significant digits


class TestNothingChanges:
    @pytest.mark.parametrize("quantized", [False, True])
    @pytest.mark.parametrize("change", [{}, {"checkpointing": "layer"}, {"optimizer": "adamw_8bit"}])
    def test_losses_weights_and_random_state_to_the_bit(
        self, quantized: bool, change: dict[str, Any], tok: Tokenizer, tmp_path: Path
    ) -> None:
        seen = []
        for probes in ([], [Probes(CLOSE)]):
            model = dropping(quantized)
            result = train(model, tok, CONVERSATIONS, config(**change), CONVERSATIONS[:3], probes=probes)
            figures = [(row["loss"], row["grad_norm"], row.get("eval_loss")) for row in result.history]
            seen.append((figures, weights(model), torch.get_rng_state(), model.training))
            assert not any(module._forward_hooks for module in model.modules())
            assert not any(p._backward_hooks for p in model.parameters())
        (plain, plain_weights, *plain_rest), (looked, looked_weights, *looked_rest) = seen
        assert plain == looked
        assert all(map(torch.equal, plain_weights, looked_weights))
        assert torch.equal(plain_rest[0], looked_rest[0]) and plain_rest[1:] == looked_rest[1:]

    def test_a_model_that_returns_logits(self, tok: Tokenizer) -> None:
        class Wrapped(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = dropping()

            def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
                return type("Output", (), {"logits": self.inner(input_ids)})()

        seen = []
        for probes in ([], [Probes(CLOSE)]):
            model = Wrapped()
            result = train(model, tok, CONVERSATIONS, config(), probes=probes)
            seen.append(([row["loss"] for row in result.history], weights(model)))
        assert seen[0][0] == seen[1][0]
        assert all(map(torch.equal, seen[0][1], seen[1][1]))

    def test_they_let_go_when_training_fails(self, tok: Tokenizer) -> None:
        model, probes = dropping(), Probes(CLOSE)
        model.model.norm.weight.data.fill_(float("nan"))
        with pytest.raises(Exception, match="the loss is nan"):
            train(model, tok, CONVERSATIONS, config(), probes=[probes])
        assert not any(p._backward_hooks for p in model.parameters())


class Witness(TrainingProbe):
    """Computes each figure by its definition, densely and in float64, on the same run."""

    def begin(self, model: nn.Module, *_: Any) -> None:
        self.layers, self.model = lora_layers(model), model
        self.rows: list[dict[str, Any]] = []
        self.examples: list[dict[str, float]] = []

    def matrices(self, which: str) -> list[Tensor]:
        return [getattr(layer, which)["default"].detach() for layer in self.layers.values()]

    def before_step(self, step: int) -> None:
        self.row: dict[str, Any] = {"step": step}
        self.parts: list[tuple[int, list[Tensor]]] = []
        self.so_far = [torch.zeros_like(p) for p in adapter_parameters(self.model)]

    def after_micro_batch(self, examples: Any, batch: Any, losses: Tensor) -> None:
        assert len(losses) == batch.trained_tokens
        gradients = [p.grad.clone() for p in adapter_parameters(self.model)]
        difference = [now.double() - before.double() for now, before in zip(gradients, self.so_far, strict=True)]
        self.parts.append((len(losses), difference))
        self.so_far = gradients

    def before_update(self) -> None:
        total = sum(n for n, _ in self.parts)
        squares = [sum(float((g * total / n).square().sum()) for g in part) for n, part in self.parts]
        whole = sum(float(g.double().square().sum()) for g in self.so_far)
        found = estimate_noise(squares, [n for n, _ in self.parts], whole)
        self.row["noise"] = found and {"signal": found.signal, "trace": found.trace}
        for key, which in (("grad_A", "lora_A"), ("grad_B", "lora_B")):
            self.row[key] = [
                float(getattr(layer, which)["default"].grad.double().norm()) for layer in self.layers.values()
            ]
        self.before = {which: [p.detach().clone() for p in self.matrices(which)] for which in ("lora_A", "lora_B")}

    def after_update(self) -> None:
        for side in "AB":
            now = self.matrices(f"lora_{side}")
            self.row[f"norm_{side}"] = [float(p.double().norm()) for p in now]
            moved = [p.double() - old.double() for p, old in zip(now, self.before[f"lora_{side}"], strict=True)]
            self.row[f"update_{side}"] = [float(one.norm()) for one in moved]
        pairs = zip(self.layers.values(), self.matrices("lora_A"), self.matrices("lora_B"), strict=True)
        values = [torch.linalg.svdvals(layer.scaling["default"] * b.double() @ a.double()) for layer, a, b in pairs]
        self.row["delta_norm"] = [float(s.norm()) for s in values]
        shares = [s / s.sum() for s in values]
        self.row["effective_rank"] = [float(torch.exp(-(p[p > 0] * p[p > 0].log()).sum())) for p in shares]
        self.rows.append(self.row)


class TestFigures:
    @pytest.fixture(scope="module")
    @staticmethod
    def run(tok: Tokenizer) -> tuple[ProbeLog, Witness, Decoder]:
        model, probes, witness = dropping(), Probes(CLOSE), Witness()
        train(model, tok, CONVERSATIONS, config(), CONVERSATIONS[:3], probes=[probes, witness])
        return probes.log, witness, model

    @pytest.mark.parametrize(
        "name", ["norm_A", "norm_B", "grad_A", "grad_B", "update_A", "update_B", "delta_norm", "effective_rank"]
    )
    def test_of_layers_are_the_dense_ones(self, name: str, run: tuple[ProbeLog, Witness, Decoder]) -> None:
        log, witness, _ = run
        due = [row for row in log.rows if name in row]
        assert [row["step"] for row in due] == (
            [2, 4, 6] if name in ("delta_norm", "effective_rank") else [*range(1, 7)]
        )
        expected = {row["step"]: row[name] for row in witness.rows}
        for row in due:
            # A's gradient at B = 0 is nothing at all, and so is the update before the first step is over.
            bound = EXACT if name in ("delta_norm", "effective_rank") else OF_NORM
            assert row[name] == pytest.approx(expected[row["step"]], rel=bound + WRITTEN, abs=0)
            if row["step"] > 1:
                assert min(row[name]) > 0

    def test_the_noise_of_the_gradient(self, run: tuple[ProbeLog, Witness, Decoder]) -> None:
        log, witness, _ = run
        assert [row["step"] for row in log.rows] == [row["step"] for row in witness.rows]
        assert sum(row["noise"] is not None for row in log.rows) >= 3
        for row, expected in zip(log.rows, witness.rows, strict=True):
            if expected["noise"] is None:
                assert row["noise"] is None  # the last conversations of an epoch may fit into one pass
                continue
            scale = abs(expected["noise"]["trace"])  # differences of near numbers: held against the larger part
            assert row["noise"] == pytest.approx(expected["noise"], rel=4 * OF_NORM, abs=4 * OF_NORM * scale)

    def test_drift_is_that_of_outputs_recorded_by_hand(
        self, run: tuple[ProbeLog, Witness, Decoder], tok: Tokenizer
    ) -> None:
        log, _, model = run
        examples = encode_records(tok, CONVERSATIONS[:3], 100)
        length = min(16, *(len(example.input_ids) for example in examples))
        ids = torch.tensor([example.input_ids[:length] for example in examples])

        def outputs() -> list[Tensor]:
            found: list[Tensor] = []
            hooks = [
                layer.register_forward_hook(lambda *args: found.append(args[2].reshape(3 * length, -1).double()))
                for layer in lora_layers(model).values()
            ]
            with torch.no_grad():
                model(ids)
            for hook in hooks:
                hook.remove()
            return found

        model.eval()
        now = outputs()
        with disable_adapters(model):
            base = outputs()
        last = log.rows[-1]
        assert last["step"] == 6 and "drift" not in log.rows[0] and "drift" in log.rows[2]
        drift = [float((a - b).norm() / b.norm()) for a, b in zip(now, base, strict=True)]
        assert last["drift"] == pytest.approx(drift, rel=EXACT + WRITTEN)
        centered = [(a - a.mean(0), b - b.mean(0)) for a, b in zip(now, base, strict=True)]
        cka = [float((b.T @ a).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm())) for a, b in centered]
        assert last["cka"] == pytest.approx(cka, rel=EXACT + WRITTEN)
        assert max(last["drift"]) > 0.01 and min(last["cka"]) < 0.9999

    def test_losses_by_position_and_conversation(self, tok: Tokenizer) -> None:
        model, probes = dropping(lora_dropout=0.0), Probes(CLOSE)
        expected = [one_by_one(model, example) for example in encode_records(tok, CONVERSATIONS, 100)]
        settings = config(max_steps=1, batch_size=10)
        train(model, tok, CONVERSATIONS, settings, probes=[probes])
        (row,) = probes.log.rows
        found = {source: (loss, count) for source, loss, count in row["examples"]}
        for record, losses in zip(CONVERSATIONS, expected, strict=True):
            assert found[record.source] == (pytest.approx(float(losses.mean()), rel=OF_LOSS), len(losses))
        bins: dict[str, list[float]] = {}
        for losses in expected:
            for position, loss in enumerate(losses.tolist()):
                bins.setdefault(next(name for name, members in BINS.items() if position in members), []).append(loss)
        by_position = {one["positions"]: (one["loss"], one["trained_tokens"]) for one in probes.log.position_loss()}
        assert by_position == {
            name: (pytest.approx(sum(losses) / len(losses), rel=OF_LOSS), len(losses)) for name, losses in bins.items()
        }
        hardest = probes.log.hardest(3)
        order = sorted(range(10), key=lambda i: -float(expected[i].mean()))
        assert [one["source"] for one in hardest] == [CONVERSATIONS[i].source for i in order[:3]]

    def test_the_table_derives_ratios(self, run: tuple[ProbeLog, Witness, Decoder]) -> None:
        log, _, model = run
        table = log.table()
        assert len(table) == 6 * 14
        last = table[-1]
        layer = list(lora_layers(model).values())[-1]
        assert last["layer"] == "model.layers.1.mlp.down_proj" and last["step"] == 6
        assert last["update_ratio_B"] == last["update_B"] / last["norm_B"]
        assert last["saturation"] == last["effective_rank"] / 4
        assert 0 < last["saturation"] <= 1
        dense = layer.delta_weight("default").detach().double().norm() / layer.base_layer.weight.double().norm()
        # The dense update is a sum over 4 ranks in fp32, scaled; in the mean its terms are sqrt(4) times as large.
        assert last["delta_share"] == pytest.approx(float(dense), rel=float(rounding(4 + 2, 2.0)))
        assert table[0]["effective_rank"] is table[0]["saturation"] is table[0]["drift"] is None

    def test_two_active_adapters_are_told_apart(self, tok: Tokenizer) -> None:
        model, probes = dropping(target_modules=["q_proj"]), Probes(CLOSE)
        add_adapter(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]), name="other")
        set_adapter(model, ["default", "other"])
        set_trained(model, ["default", "other"])
        train(model, tok, CONVERSATIONS, config(max_steps=3), probes=[probes])
        names = probes.log.header.layers
        assert names[:2] == ["model.layers.0.self_attn.q_proj:default", "model.layers.0.self_attn.q_proj:other"]
        assert probes.log.header.ranks[:2] == [4, 2]
        assert len(probes.log.rows[-1]["drift"]) == len(names) == 6

    def test_an_adapted_head_is_among_the_layers(self, tok: Tokenizer) -> None:
        probes = Probes(CLOSE)
        train(dropping(target_modules=["q_proj", "lm_head"]), tok, CONVERSATIONS, config(max_steps=3), probes=[probes])
        assert probes.log.header.layers[-1] == "lm_head"
        assert all(value > 0 for value in probes.log.rows[-1]["drift"])

    def test_the_updates_of_experts_count_together(self) -> None:
        layer = LoRAParameter(Experts(), "weight")
        layer.add("default", AdapterSpec(2, 0.5, neutral_start=False))
        found = Adapted("experts", layer, "default").singular_values()
        each = [torch.linalg.svdvals(part.double())[:2] for part in layer.delta_weight("default")]
        up, down = layer.factors("default")  # multiplied out in fp32, with two terms each
        assert_within(found, torch.cat(each).sort(descending=True).values, rounding(2 + 2, up.norm() * down.norm()))
        assert Adapted("experts", layer, "default").rank == 6


class Experts(nn.Module):
    """Three matrices in one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 8, 5), requires_grad=False)


def one_by_one(model: Decoder, example: Any) -> Tensor:
    """Return the losses of an example's trained tokens, from its plain logits."""
    with torch.no_grad():
        logits = model(torch.tensor([example.input_ids]))[0, :-1].double()
    losses = cross_entropy(logits, torch.tensor(example.input_ids[1:]), reduction="none")
    return losses[torch.tensor(example.loss_mask[1:])]


class TestNoise:
    @given(st.lists(st.integers(1, 50), min_size=2, max_size=6), st.integers(0, 2**31))
    def test_micro_batches_of_known_moments(self, tokens: list[int], seed: int) -> None:
        """Where |g_i|² and |G|² are what they are in expectation, the estimate is the truth."""
        signal, trace = (torch.rand(2, generator=torch.Generator().manual_seed(seed)) + 0.1).tolist()
        squares = [signal + trace / n for n in tokens]
        found = estimate_noise(squares, tokens, signal + trace / sum(tokens))
        assert found is not None
        assert (found.signal, found.trace) == (pytest.approx(signal), pytest.approx(trace))
        assert noise_scale([found, found]) == pytest.approx(trace / signal)

    def test_equal_micro_batches_give_the_papers_formula(self) -> None:
        squares, small, big, square = [3.0, 4.0, 5.0], 10, 30, 2.5
        mean = sum(squares) / 3
        found = estimate_noise(squares, [small] * 3, square)
        assert found is not None
        assert found.signal == pytest.approx((big * square - small * mean) / (big - small))
        assert found.trace == pytest.approx((mean - square) / (1 / small - 1 / big))

    def test_one_micro_batch_says_nothing(self, tok: Tokenizer) -> None:
        assert estimate_noise([1.0], [5], 1.0) is None and noise_scale([]) is None
        probes = Probes(CLOSE)
        train(dropping(), tok, CONVERSATIONS, config(micro_batch_tokens=4096, max_steps=2), probes=[probes])
        assert [row["noise"] for row in probes.log.rows] == [None, None]
        assert probes.log.steps()[0] == {"step": 1, "signal": None, "trace": None, "noise_scale": None}

    def test_what_the_estimates_converge_to(self, tok: Tokenizer) -> None:
        """Gradients of single conversations, drawn at random: the mean of the estimates is the known variance."""
        model = dropping(lora_dropout=0.0, init_lora_weights=False)
        gradients = []
        for example in encode_records(tok, CONVERSATIONS, 100):
            model.zero_grad()
            accumulate_gradients(model, [example], 100)
            gradients.append(torch.cat([p.grad.double().reshape(-1) for p in adapter_parameters(model)]))
        population = torch.stack(gradients)
        true = population.mean(0)
        random = torch.Generator().manual_seed(0)
        drawn = [population[torch.randint(10, (4,), generator=random)] for _ in range(4000)]
        found = [
            estimate_noise(part.square().sum(1).tolist(), [1] * 4, float(part.mean(0).square().sum())) for part in drawn
        ]
        trace = sum(one.trace for one in found if one) / len(found)
        signal = sum(one.signal for one in found if one) / len(found)
        assert trace == pytest.approx(float((population - true).square().sum(1).mean()), rel=0.05)
        assert signal == pytest.approx(float(true.square().sum()), rel=0.1)


class TestAlignment:
    @given(st.integers(2, 12), st.integers(1, 8), st.integers(1, 8), st.integers(0, 2**31))
    def test_cka_is_that_of_the_features(self, tokens: int, width: int, other: int, seed: int) -> None:
        random = torch.Generator().manual_seed(seed)
        x = torch.randn(tokens, width, generator=random, dtype=torch.float64)
        y = torch.randn(tokens, other, generator=random, dtype=torch.float64)
        a, b = x - x.mean(0), y - y.mean(0)
        dense = float((b.T @ a).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm()))
        assert linear_cka(x, y) == pytest.approx(dense, rel=EXACT, abs=EXACT)

    def test_cka_does_not_see_rotation_scale_or_offset(self) -> None:
        x = torch.randn(20, 5, dtype=torch.float64)
        rotation = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q
        assert linear_cka(x, 3 * x @ rotation + 7) == pytest.approx(1.0, rel=EXACT)
        assert linear_cka(x, torch.randn(20, 5)) < 0.9
        assert relative_drift(2 * x, x) == 1.0
        assert relative_drift(0 * x, 0 * x) == 0.0
