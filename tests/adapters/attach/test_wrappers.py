"""A model compiled, distributed or recomputed, in whole or in part, has the adapters and files of the plain one."""

from __future__ import annotations

import functools
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from made import small_decoder
from safetensors.torch import load_file
from tolerances import assert_alike
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DataParallel, DistributedDataParallel

from lorakit import (
    Linear4bit,
    LoraConfig,
    adapter_parameters,
    adapter_status,
    add_adapter,
    disable_adapters,
    inspect_adapter,
    load_adapter,
    merge_adapter,
    quantize,
    remove_adapter,
    save_adapter,
    set_adapter,
    swap_adapter,
    unmerge_adapter,
    use_rows,
)
from lorakit.adapters import adapter_modules
from lorakit.errors import AdapterError

IDS = torch.tensor([[5, 17, 300, 2, 41]])
CONFIG = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, modules_to_save=["norm"])

compiled = functools.partial(torch.compile, backend="eager")


def layer(model: nn.Module) -> nn.ModuleList:
    layers = model.model.layers
    assert isinstance(layers, nn.ModuleList)
    return layers


def each_layer(wrap: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    def wrapped(model: nn.Module) -> nn.Module:
        for number, one in enumerate(layer(model)):
            layer(model)[number] = wrap(one)
        return model

    return wrapped


def one_linear(model: nn.Module) -> nn.Module:
    attention = layer(model)[0].self_attn
    attention.q_proj = compiled(attention.q_proj)
    return model


def in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    layer(model)[1].compile(backend="eager")
    return model


def alone() -> None:
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def distributed(model: nn.Module) -> nn.Module:
    alone()
    model.model.norm.weight.requires_grad_(True)  # it refuses a model that trains nothing
    return DistributedDataParallel(model)


def nested(model: nn.Module) -> nn.Module:
    return compiled(DataParallel(each_layer(lambda one: checkpoint_wrapper(compiled(one)))(model)))


WRAPPINGS = {
    "compiled": compiled,
    "compiled in place": in_place,
    "compiled layers": each_layer(compiled),
    "a compiled linear layer": one_linear,
    "DataParallel": DataParallel,
    "DistributedDataParallel": distributed,
    "recomputed layers": each_layer(checkpoint_wrapper),
    "nested": nested,
}


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch.compiler.reset()


def plain(name: str = "default") -> nn.Module:
    model = small_decoder()
    torch.manual_seed(1)
    add_adapter(model, CONFIG, name)
    return model


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(IDS)
    return result


def same(model: nn.Module, expected: Tensor) -> None:
    """Such a layer may add in another order: in two blocks, products of 32 and 64 terms and sums over 5 tokens."""
    assert_alike(output(model), expected, terms=2 * (4 * 32 + 64 + 5))


def files(folder: Path) -> tuple[dict[str, Tensor], str]:
    return load_file(folder / "adapter_model.safetensors"), (folder / "adapter_config.json").read_text()


def same_files(first: Path, second: Path) -> None:
    (ours, our_config), (theirs, their_config) = files(first), files(second)
    assert our_config == their_config and ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("is_first", [True, False], ids=["wrapped first", "attached first"])
@pytest.mark.parametrize("wrap", WRAPPINGS.values(), ids=WRAPPINGS)
def test_every_call_does_what_it_does_to_the_plain_model(
    wrap: Callable[[nn.Module], nn.Module], is_first: bool, tmp_path: Path
) -> None:
    reference, bare = plain(), output(small_decoder())
    if is_first:
        model = wrap(small_decoder())
        torch.manual_seed(1)
        add_adapter(model, CONFIG)
    else:
        model = wrap(plain())
    same(model, output(reference))
    assert list(adapter_modules(model)) == list(adapter_modules(reference))
    assert len(adapter_parameters(model)) == len(adapter_parameters(reference))
    same_files(save_adapter(model, tmp_path / "wrapped"), save_adapter(reference, tmp_path / "plain"))
    assert adapter_status(model).irregularities == [] and list(adapter_status(model).adapters) == ["default"]
    here, there = inspect_adapter(model), inspect_adapter(reference)
    assert [one.row() for one in here.layers] == [one.row() for one in there.layers]

    with disable_adapters(model):
        same(model, bare)
    set_adapter(model, [])
    same(model, bare)
    set_adapter(model, "default")
    load_adapter(model, tmp_path / "plain", "second")
    same(model, output(reference))
    with use_rows(model, ["__base__"]):
        same(model, bare)
    remove_adapter(model, "second")
    set_adapter(model, "default")

    merge_adapter(model)
    merge_adapter(reference)
    same(model, output(reference))
    unmerge_adapter(model)
    unmerge_adapter(reference)
    same(model, output(reference))
    remove_adapter(model)
    same(model, bare) and not adapter_modules(model)


def test_files_with_a_compiled_models_names_are_read(tmp_path: Path) -> None:
    """PEFT writes them."""
    from safetensors.torch import save_file

    folder = save_adapter(plain(), tmp_path / "adapter")
    tensors, _ = files(folder)
    prefix = "base_model.model."
    renamed = {f"{prefix}_orig_mod.{key.removeprefix(prefix)}": tensor for key, tensor in tensors.items()}
    save_file(renamed, folder / "adapter_model.safetensors")
    model = small_decoder()
    load_adapter(model, folder)
    assert torch.equal(output(model), output(plain()))


def test_a_head_compiled_inside_is_saved_under_its_own_name(tmp_path: Path) -> None:
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.Sequential(compiled(nn.Linear(4, 2)))})
    add_adapter(model, LoraConfig(r=2, target_modules=["body"], modules_to_save=["head"]))
    tensors, _ = files(save_adapter(model, tmp_path / "adapter"))
    assert {f"base_model.model.head.0.{name}" for name in ("weight", "bias")} <= tensors.keys()
    again = nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.Sequential(nn.Linear(4, 2))})
    load_adapter(again, tmp_path / "adapter", check_base=False)
    same_files(save_adapter(again, tmp_path / "again"), tmp_path / "adapter")


class TestDivided:
    """Models that FSDP has divided among processes."""

    def test_one_process(self, tmp_path: Path) -> None:
        alone()
        reference, model = plain(), plain()
        for one in layer(model):
            fully_shard(one)
        fully_shard(model)
        assert torch.equal(output(model), output(reference))
        same_files(save_adapter(model, tmp_path / "divided"), save_adapter(reference, tmp_path / "plain"))
        low_rank = LoraConfig(r=2, init_lora_weights=False)
        for one in (model, reference):
            add_adapter(one, low_rank, "other")
        swap_adapter(model, "other", save_adapter(reference, tmp_path / "other", "other"))
        same_files(save_adapter(model, tmp_path / "swapped", "other"), tmp_path / "other")

    def test_4_bits(self, tmp_path: Path) -> None:
        def make() -> nn.Module:
            torch.manual_seed(0)
            dense = nn.Linear(64, 64)
            model = nn.Sequential(Linear4bit(quantize(dense.weight, double_quant=False), dense.bias), nn.Linear(64, 8))
            add_adapter(model, LoraConfig(r=2, init_lora_weights=False))
            return model

        alone()
        divided = make()
        fully_shard(divided)
        for name, model in (("divided", divided), ("plain", make())):
            save_adapter(model, tmp_path / name)
        files = [tmp_path / name / "adapter_model.safetensors" for name in ("divided", "plain")]
        assert files[0].read_bytes() == files[1].read_bytes()  # with the samples of the base

    def test_two_processes(self, tmp_path: Path) -> None:
        spawn = multiprocessing.get_context("spawn")
        workers = [spawn.Process(target=one_of_two, args=(rank, tmp_path)) for rank in (0, 1)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(120)
        assert [worker.exitcode for worker in workers] == [0, 0]
        reference = plain()
        save_adapter(reference, tmp_path / "plain")
        for name in ("divided", "whole", "layers", "layers alone"):
            same_files(tmp_path / name, tmp_path / "plain")


def divided(model: nn.Module) -> nn.Module:
    return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))


def one_of_two(rank: int, folder: Path) -> None:
    """What each of two processes does."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model, bare = plain(), output(plain())
    for one in layer(model):
        fully_shard(one)
    fully_shard(model)
    assert torch.equal(output(model), bare)
    save_adapter(model, folder / "divided")
    wrapped_models = {
        "whole": divided(plain()),
        "layers": divided(each_layer(divided)(plain())),
        "layers alone": each_layer(divided)(plain()),
    }
    with pytest.raises(AdapterError, match="this model is divided among processes"):
        merge_adapter(model)
    for name, wrapped in wrapped_models.items():
        same(wrapped, bare)  # the weights are aligned otherwise
        save_adapter(wrapped, folder / name)
        load_adapter(wrapped, folder / "divided", "second")
        same(wrapped, bare)
    assert (folder / "divided" / "adapter_config.json").is_file()  # in every process, when the call returns
    with pytest.raises(AdapterError, match="wrapped by FSDPModule already"):
        add_adapter(model, CONFIG, "late")
    with pytest.raises(AdapterError, match="wrapped by DistributedDataParallel already"):
        add_adapter(distributed(small_decoder()), CONFIG)
    wrapped = distributed(small_decoder())
    load_adapter(wrapped, folder / "divided")
    assert torch.equal(output(wrapped), bare)
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "settings",
    [
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"modules_to_save": ["lm_head"], "ensure_weight_tying": True},
        {"trainable_token_indices": [3, 5]},
        {"bias": "all"},
    ],
    ids=str,
)
def test_tied_modules_that_are_wrapped(settings: dict[str, Any], tmp_path: Path) -> None:
    plain, wrapped = (small_decoder(tie_word_embeddings=True) for _ in range(2))
    wrapped.model.embed_tokens, wrapped.lm_head = compiled(wrapped.model.embed_tokens), compiled(wrapped.lm_head)
    each_layer(compiled)(wrapped)
    for model in (plain, wrapped):
        torch.manual_seed(1)
        add_adapter(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, **settings))
        with torch.no_grad():
            for parameter in adapter_parameters(model):
                parameter += 0.1
    expected = plain(IDS)
    assert torch.equal(wrapped(IDS), expected)
    folders = [save_adapter(model, tmp_path / str(number)) for number, model in enumerate((plain, wrapped))]
    ours, others = ([file.read_bytes() for file in sorted(folder.iterdir())] for folder in folders)
    assert ours == others
    loaded = small_decoder(tie_word_embeddings=True)
    load_adapter(compiled(loaded), folders[1])
    assert torch.equal(loaded(IDS), expected)
    for model in (plain, wrapped):
        merge_adapter(model)
    assert torch.equal(wrapped(IDS), plain(IDS))
    unmerge_adapter(wrapped)
    assert torch.equal(wrapped(IDS), expected)
