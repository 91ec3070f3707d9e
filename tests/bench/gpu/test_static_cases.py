"""The kernels that are compiled and counted: all there are, with the bytes that can be counted by hand."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil

import pytest

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs triton")


def test_every_kernel_has_a_case() -> None:
    static_cases = importlib.import_module("bench.gpu.static_cases")
    package = importlib.import_module("lorakit_kernels.triton")
    jitted = importlib.import_module("triton").JITFunction
    modules = [
        importlib.import_module(f"{package.__name__}.{info.name}") for info in pkgutil.iter_modules(package.__path__)
    ]
    kernels = {
        name for module in modules for name, value in vars(module).items()
        if isinstance(value, jitted) and name.endswith("_kernel")
    }  # fmt: skip
    for lanes in (32, 64):
        cases = list(static_cases.cases(lanes))
        assert {case.source.fn.__name__ for case in cases} == kernels and len(kernels) >= 13
        assert len({case.name for case in cases}) == len(cases)


@pytest.mark.parametrize(
    ("name", "moved"),
    [
        ("dequantize_4bit", 0.5 + 4 / 64 + 2),
        ("dequantize_4bit nested", 0.5 + 1 / 64 + 4 / 64 / 256 + 2),
        ("quantize_4bit", 2 + 0.5 + 4 / 64),
        ("decode nested", 0.5 + 1 / 64 + 4 / 64 / 256 + 2 * 16 * 2 / 4096),
        ("rms_norm 4096", 2 + 2 + 4 / 4096),
        ("rms_norm_backward 128", 2 + 2 + 2 + 4 / 128),
        ("rope", 2 + 2 + 2 * 64 * 2 / (40 * 128)),
        ("swiglu", 3 * 2),
        ("swiglu_backward", 5 * 2),
        ("drop bf16", 2 * 2),
        ("drop fp32", 2 * 4),
        ("cross_entropy", 2),
        ("cross_entropy with gradient", 3 * 2),
        ("adamw_8bit fp32", 3 * 4 + 4 * 1 + 4 * 4 / 256),
        ("adamw_8bit bf16", 3 * 2 + 4 * 1 + 4 * 4 / 256),
    ],
)
def test_bytes_moved(name: str, moved: float) -> None:
    cases = {case.name: case for case in importlib.import_module("bench.gpu.static_cases").cases(32)}
    assert cases[name].bytes_moved == pytest.approx(moved, rel=1e-12)


def test_a_kernel_of_each_kind_is_counted(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """On one GPU of each maker: loops for the loss, the whole kernel for SwiGLU, and no spills."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    static_gpu, sass = (importlib.import_module(f"bench.gpu.{name}") for name in ("static_gpu", "sass"))
    for target in (static_gpu.TARGETS[3], static_gpu.TARGETS[5]):
        cases = {case.name: case for case in static_gpu.cases(target.warp_size)}
        counted = {}
        for name in ("swiglu", "cross_entropy", "cross_entropy with gradient"):
            asm = cases[name].compile(target).asm
            code = sass.nvidia(asm["cubin"]) if "cubin" in asm else sass.amd(asm["amdgcn"])
            assert code.spills == 0 and code.load_bytes >= 8
            assert len(code.loops) == {"swiglu": 0, "cross_entropy": 1}.get(name, 2)
            counted[name] = static_gpu.counted(cases[name], code), len(code.names)
        assert counted["swiglu"][0] == counted["swiglu"][1]
        assert 0 < counted["cross_entropy"][0] < counted["cross_entropy"][1]
        assert counted["cross_entropy"][0] < counted["cross_entropy with gradient"][0]
