"""The page: the API's own figures inside, nothing from outside, and every control doing what it says in a browser."""

import json
import re
from dataclasses import replace

import pytest
from browser import BROWSER, in_browser
from made_adapters import gaussian, write_adapter, write_base

from lorakit.inspection import inspect_adapter
from lorakit.inspection.html.page import DIGITS, page, write_page
from lorakit.inspection.probes.log import Header, ProbeLog
from lorakit.inspection.quantization.quantization_view import QuantizationView, measure_quantization
from lorakit.quantization import quantize

HOSTILE = "model.layers.2.</script><img src=x onerror=alert(1)>"


def paths(layers):
    return [f"model.layers.{n}.self_attn.{module}" for n in range(layers) for module in ("q_proj", "o_proj")]


@pytest.fixture(scope="module")
def info(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    names = [*paths(5), "lm_head"]
    one = write_adapter(folder / "one", {path: gaussian(20, 16, 4, number) for number, path in enumerate(names)})
    two = write_adapter(folder / "two", {path: gaussian(20, 16, 6, 50 + n) for n, path in enumerate(paths(5)[:-1])})
    base = write_base(
        folder / "base", {path: gaussian(20, 16, 1, 9)[0] @ gaussian(20, 16, 1, n)[1] for n, path in enumerate(names)}
    )
    return inspect_adapter(one, base=base, vs=two)


def embedded(html):
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    return json.loads(data)


def test_figures_are_those_of_the_api(info):
    data = embedded(page(info))
    for adapter, shown in ((info, data["adapters"][0]), (info.other, data["adapters"][1])):
        table = adapter.table()
        assert list(shown["columns"]) == list(table[0])
        for column, values in shown["columns"].items():
            for row, value in zip(table, values, strict=True):
                expected = row[column]
                assert value == (float(f"{expected:.{DIGITS}g}") if isinstance(expected, float) else expected)
        for layer, spectrum in zip(adapter.layers, shown["spectra"], strict=True):
            assert spectrum == [float(f"{value:.{DIGITS}g}") for value in layer.singular_values]
    assert data["findings"] == list(info.findings)
    assert data["base"] == info.base


def test_history_and_quantization_are_shown(info, tmp_path):
    names = [layer.name for layer in info.layers]
    history = ProbeLog(
        Header(names, [4] * len(names), [1.0] * len(names)),
        [{"step": step, "delta_norm": [0.5 * step + n for n in range(len(names))]} for step in range(1, 2000)],
    )
    weights = {name: gaussian(20, 64, 8, n)[0] @ gaussian(20, 64, 8, n)[1] for n, name in enumerate(names[:3])}
    quantized = [measure_quantization(name, quantize(weight), weight) for name, weight in weights.items()]
    html = page(info, history, QuantizationView(tuple(quantized)))
    rounded = 0.5 * 10 ** (1 - DIGITS)
    data = embedded(html)
    shown = data["history"]["Norm of the update"]
    assert shown["steps"][0] == 1 and shown["steps"][-1] == 1999
    assert shown["layers"][names[2]] == [0.5 * step + 2 for step in shown["steps"]]
    assert data["quantization"][names[1]]["shares"] == pytest.approx(
        [code.share for code in quantized[1].codes], rel=rounded
    )
    column = data["adapters"][0]["columns"]["quant_snr_db"]
    assert column[:3] == pytest.approx([layer.error.snr_db for layer in quantized], rel=rounded) and set(
        column[3:]
    ) == {None}
    assert any("dB SNR" in finding for finding in data["findings"])
    if BROWSER is None:
        return
    steps = f"""
        document.querySelector('.map [data-name="{names[0]}"]').click();
        const select = document.getElementById("measure");
        select.value = "quant_snr_db";
        select.dispatchEvent(new Event("change"));
        return [[...document.querySelectorAll("#charts h3")].map((title) => title.textContent),
                document.querySelector('.map [data-name="{names[0]}"]').getAttribute("aria-label")];
    """
    (titles, label), problems = in_browser(html, steps, tmp_path)
    assert problems == []
    assert {"Norm of the update, while training", "How often each 4-bit code is used"} <= set(titles)
    assert label == f"{names[0]}: {quantized[0].error.snr_db:.4g}"


def test_nothing_is_fetched_and_no_name_breaks_out(tmp_path):
    folder = write_adapter(tmp_path / "a", {HOSTILE: gaussian(6, 5, 2)})
    write_page(inspect_adapter(folder), tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert HOSTILE not in html
    assert embedded(html)["adapters"][0]["columns"]["name"] == [HOSTILE]
    assert set(re.findall(r"https?://[^\s\"']+", html)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<(link|img|iframe)\b|\bsrc=|@import|url\(", html.partition('id="data">')[0])
    assert "fetch(" not in html and "XMLHttpRequest" not in html and "import(" not in html
    assert "default-src 'none'" in html


def test_a_large_adapter_stays_within_two_megabytes(tmp_path):
    """Llama-70B's shape, 80 blocks of 7 modules with rank 64, beside another: one measured, the others like it."""
    modules = [f"model.layers.0.mlp.{module}_proj" for module in "abcdefg"]
    factors = {name: gaussian(80, 80, 64, number) for number, name in enumerate(modules)}
    other = {name: (b + gaussian(80, 1, 64, 99)[0] / 8, a) for name, (b, a) in factors.items()}
    one = inspect_adapter(write_adapter(tmp_path / "one", factors), vs=write_adapter(tmp_path / "two", other))

    def repeated(layers, **changes):
        again = [(layer, layer.name.replace(".0.", f".{block}.")) for block in range(80) for layer in layers]
        return tuple(
            replace(layer, name=name, **{key: int(name.split(".")[2]) for key in changes}) for layer, name in again
        )

    comparison = replace(one.comparison, layers=repeated(one.comparison.layers))
    two = replace(one.other, layers=repeated(one.other.layers, index=0))
    html = page(replace(one, layers=repeated(one.layers, index=0), other=two, comparison=comparison))
    assert len(embedded(html)["adapters"][1]["spectra"]) == 560
    assert len(html.encode()) <= 2_000_000


needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")


@needs_browser
def test_click_keys_measures_and_comparison(info, tmp_path):
    result, problems = in_browser(
        page(info),
        """
        const cell = (name, map = 0) => document.querySelectorAll(".map")[map].querySelector(`[data-name="${name}"]`);
        const title = () => document.getElementById("layer-title").textContent;
        const all = (selector, inside = document) => [...inside.querySelectorAll(selector)];
        const shown = (column) => all(`#figures tr[data-column="${column}"] td`).map((td) => td.textContent);
        const measure = (value) => {
          const select = document.getElementById("measure");
          select.value = value;
          select.dispatchEvent(new Event("change"));
        };
        const press = (key) =>
          document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
        const found = { maps: document.querySelectorAll(".map").length, start: title() };
        const name = "model.layers.2.self_attn.q_proj";
        cell(name).click();
        found.clicked = title();
        found.norms = shown("norm");
        found.chosen = all(".cell.chosen").map((one) => one.dataset.name);
        found.charts = document.querySelectorAll("#charts svg[role=img][aria-label]").length;
        cell(name).focus();
        press("ArrowRight");
        found.right = title();
        press("ArrowDown");
        found.down = title();
        press("End");
        press("ArrowRight");
        found.edge = title();
        found.focused = document.activeElement.dataset.name;
        const color = cell(name).style.background;
        measure("effective_rank");
        found.label = cell(name).getAttribute("aria-label");
        found.recolored = color !== cell(name).style.background;
        measure("vs_cosine");
        found.compared = document.querySelectorAll(".map").length;
        found.only = cell("model.layers.4.self_attn.o_proj").className;
        document.getElementById("all").open = true;
        await frame();
        found.rows = document.querySelectorAll("#table tbody tr").length;
        found.tabStops = all(".grid").map((grid) => all("[tabindex='0']", grid).length);
        found.unlabelled = document.querySelectorAll(".cell:not([aria-label]), svg:not([aria-label])").length;
        return found;
        """,
        tmp_path,
    )
    assert problems == []
    name = "model.layers.2.self_attn.q_proj"
    layer, other = ({one.name: one for one in side.layers}[name] for side in (info, info.other))
    assert result["maps"] == 2
    assert result["start"] == max(info.layers, key=lambda one: one.norm).name
    assert result["clicked"] == name and result["chosen"] == [name, name]
    assert [float(text) for text in result["norms"]] == [float(f"{one.norm:.4g}") for one in (layer, other)]
    assert result["charts"] == 4
    assert result["right"] == "model.layers.3.self_attn.q_proj"
    assert result["down"] == "model.layers.3.self_attn.o_proj"
    assert result["edge"] == result["focused"] == "model.layers.4.self_attn.o_proj"
    assert result["label"] == f"{name}: {layer.effective_rank:.4g}"
    assert result["recolored"] and result["compared"] == 1
    assert "none" in result["only"]
    assert result["rows"] == len(info.layers)
    assert set(result["tabStops"]) == {1} and result["unlabelled"] == 0
