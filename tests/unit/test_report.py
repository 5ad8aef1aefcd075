"""The page of `inferos eval --report`: complete by itself, escaped, and true to what was measured."""

from __future__ import annotations

import base64
import html.parser
import re
import struct
import zlib
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from caches import FORMATS, NOT_HELD, feed
from typer.testing import CliRunner

from inferos.cli import app
from inferos.errors import ShapeError
from inferos.kv import KVCache, LayerSpec
from inferos.quality import Interval, Measures, Recall, _drawing
from inferos.quality.measures import Position
from inferos.quality.report import Curve, CurveRecorder, Page, ResultRow, TierMap, _level, render, tier_map

HOSTILE = "<script>alert('x')</script>&\"'`{{ 1 }}"
VOID = {"meta", "path", "circle", "img", "br"}
NEVER_CLOSED = {"td", "th", "tr"}  # HTML lets these end by themselves


class Checker(html.parser.HTMLParser):
    """Tags in balance, and every address the page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in {"src", "href", "xlink:href", "data"}]
        if tag not in VOID | NEVER_CLOSED:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID | NEVER_CLOSED:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def check(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert "script" not in checker.tags
    assert all(address.startswith("data:image/png;base64,") for address in checker.addresses)
    assert "url(" not in page
    assert "@import" not in page
    assert len(page.encode()) <= 1_000_000
    return checker


def measures(**changed: Any) -> Measures:
    values: dict[str, Any] = {
        "positions": 100, "context": 200, "ppl": 12.5, "ppl_interval": Interval(12, 13),
        "delta_ppl_rel": 0.001, "delta_ppl_rel_interval": Interval(-0.001, 0.003), "kld_mean": 2e-3,
        "kld_mean_interval": Interval(1e-3, 3e-3), "kld_median": 1e-3, "kld_p99": 1e-2, "kld_max": 2e-2,
        "rms_delta_p": 1e-2, "same_top1": 0.99, "same_top1_interval": Interval(0.98, 1.0), "kv_bytes": 1 << 21,
        "kv_elements": 1 << 20, "tokens_per_s": 100.0,
    }  # fmt: skip
    # What the page does not show may be anything.
    others = {f.name: Interval(0, 0) if f.name.endswith("_interval") else 0 for f in fields(Measures)}
    return Measures(**{**others, **values, **changed})


def full_page(name: str = "model", shape: tuple[int, int, int] = (3, 2, 5)) -> Page:
    random = np.random.default_rng(0)
    tiers = TierMap("auto", 64 * shape[2], random.integers(0, 4, shape).astype(np.uint8), random.random(shape))
    recall = Recall(0.5, 0.1, 0.9, (True, False), {"kv": 0.5}, {}, 1.0, 200)
    rows = [
        ResultRow("off", 1 << 22, 32.0, 90.0, 12.4),
        ResultRow("int8", 1 << 21, 8.5, 100.0, 12.5, measures(), recall),
        ResultRow("int4", None, None, None, None, measures(kld_mean=0.5)),
    ]
    curves = {"int8": Curve((100, 150), (1e-5, 0.0), (1 << 20, 1 << 21)), "int4": Curve((), (), ())}
    return Page(name, f"Fed {name}.", {name: name}, rows, curves, 3072.0, tiers)


def pixels(uri: str) -> npt.NDArray[np.uint8]:
    """Palette indices (rows, columns) of a PNG without filters, its checksums verified."""
    png, at, parts = base64.b64decode(uri.partition(",")[2]), 8, {}
    while at < len(png):
        (size,) = struct.unpack_from(">I", png, at)
        kind, content = png[at + 4 : at + 8], png[at + 8 : at + 8 + size]
        assert struct.unpack_from(">I", png, at + 8 + size)[0] == zlib.crc32(kind + content)
        parts[kind] = content
        at += 12 + size
    columns, rows = struct.unpack_from(">II", parts[b"IHDR"])
    lines = np.frombuffer(zlib.decompress(parts[b"IDAT"]), np.uint8).reshape(rows, columns + 1)
    assert not lines[:, 0].any()
    return lines[:, 1:]


def test_a_page_stands_alone_and_shows_every_row_plot_and_tier() -> None:
    page = render(full_page())
    checker = check(page)
    text = " ".join(checker.text)
    for word in ("off", "int8", "2.00 MiB", "+0.10 %", "2.0e-03", "99.0 %", "1/2", "default", "outside", "layer 2"):
        assert word in text
    assert checker.tags.count("figure") == 2
    assert checker.tags.count("img") == 1
    assert page.count("polyline") >= 3  # int8 twice, and the FP16 line


def test_what_comes_from_outside_is_escaped() -> None:
    page = render(full_page(HOSTILE))
    assert "<script" not in page
    assert "".join(check(page).text).count(HOSTILE) == 5  # title, heading, summary, and a fact's name and value


def test_a_page_without_curves_or_tiers_has_no_plots() -> None:
    checker = check(render(Page("m", "s", {}, [ResultRow("off", 1, 32.0, None, None)])))
    assert "figure" not in checker.tags
    assert "img" not in checker.tags


def test_a_page_about_a_large_model_at_a_long_context_stays_below_a_megabyte() -> None:
    checker = check(render(full_page(shape=(80, 8, 2048))))
    assert "one block of 3 is shown" in " ".join(checker.text)


def test_the_same_evaluation_gives_the_same_bytes() -> None:
    assert render(full_page()) == render(full_page())


def test_a_level_is_named_only_where_all_its_bounds_hold() -> None:
    assert _level(measures()) == "default"
    assert _level(measures(kld_mean=0.02)) == "economy"
    assert _level(measures(same_top1=0.95)) == "economy"
    assert _level(measures(delta_ppl_rel=0.03)) == ""
    assert _level(measures(delta_ppl_rel=float("nan"))) == ""


def test_the_tier_map_tells_what_the_cache_holds() -> None:
    with KVCache([LayerSpec(2, 16), LayerSpec(1, 16, 64)], kv="auto") as cache:
        with pytest.raises(ShapeError, match="0 tokens"):
            tier_map(cache)
        feed(cache, 400, commit=False)
        cache.attend(0, np.ones((400, 4, 16), np.float32))
        cache.commit()
        feed(cache, 1)
        cache.demote(0, 1, 2, "int4")
        found = tier_map(cache)
    assert found.tokens == 401
    # Four sinks; then blocks 0..4 have left the window of 64 tokens, 5 and 6 are in it.
    assert found.formats[0, 0].tolist() == [FORMATS["int8"]] * 5 + [FORMATS["f16"]] * 2
    assert found.formats[0, 1, 2] == FORMATS["int4"]
    assert (found.formats[1, 1] == NOT_HELD).all()
    assert found.formats[1, 0, 0] == NOT_HELD  # behind the sliding window
    ranks = found.ranks[0, 0]
    assert sorted(ranks[:5]) == [0, 0.25, 0.5, 0.75, 1]
    assert np.isnan(ranks[5:]).all()


def test_a_pixel_is_a_block_with_its_tier_and_its_importance() -> None:
    formats = np.array([[[0, 1, 2, 3, 255]]], np.uint8)
    ranks = np.array([[[np.nan, 0.0, 0.5, 1.0, np.nan]]])
    drawn = _drawing.heat_map(formats, ranks)
    top = _drawing.SHADES - 1
    expected = [top, 8 + 0, 16 + round(top / 2), 24 + top, 32]
    assert pixels(drawn.uri).tolist() == [expected]
    assert [(name, share) for name, share, _, _ in drawn.shares] == [
        ("f16", 0.2), ("int8", 0.2), ("k8v4", 0.2), ("int4", 0.2), ("not held", 0.2),
    ]  # fmt: skip


@pytest.mark.parametrize("values", [(0.0, 0.0), (1e-9, 5.0), (1.0, 1.0), (3e-5, 3e-5)])
def test_a_logarithmic_plot_stays_inside_its_frame(values: tuple[float, float]) -> None:
    drawn = _drawing.plot({"int8": ((100, 200), values)}, logarithmic=True)
    for x, y in re.findall(r"([-\d.]+),([-\d.]+)", drawn.lines[0].points):
        assert drawn.left <= float(x) <= drawn.right
        assert drawn.top - 0.1 <= float(y) <= drawn.bottom + 0.1
    assert len(drawn.y_ticks) >= 2


@pytest.mark.parametrize("high", [1, 999, 3000, 5 << 20, 7 << 30])
def test_a_plot_of_bytes_begins_at_zero_and_names_its_units(high: int) -> None:
    drawn = _drawing.plot({"int8": ((1, 9), (0, high))}, reference=0.0)
    assert drawn.y_ticks[0].text.startswith("0 ")
    assert 2 <= len(drawn.y_ticks) <= 7
    assert 1 <= len(drawn.x_ticks) <= 10
    assert drawn.lines[0].name == "fp16"


def test_a_curve_of_one_point_is_drawn() -> None:
    assert len(_drawing.plot({"int8": ((7,), (0.5,))}, logarithmic=True).lines[0].points.split()) == 1


def test_a_curve_holds_means_over_stretches() -> None:
    class Sequence:
        kv_bytes = 5

    recorder = CurveRecorder(64)
    for token in range(1, 6):  # the fifth does not fill a stretch
        recorder(token, Position(0, 0, float(token), 0, 1), Sequence())
    assert recorder.curve() == Curve((2, 4), (1.5, 3.5), (5, 5))
    for token in range(1, 5):  # a second text
        recorder(token, Position(0, 0, 0.5, 0, 1), Sequence())
    assert recorder.curve() == Curve((2, 4), (1.0, 2.0), (5, 5))
    assert CurveRecorder(3).curve() == Curve((), (), ())


def test_eval_writes_the_page_and_refuses_a_place_for_it_before_the_work(tmp_path: Path) -> None:
    command = ["eval", "reference", "--context", "220", "--threads", "1", "--kv", "off,int4,auto", "--no-recall"]
    result = CliRunner().invoke(app, [*command, "--report", str(tmp_path / "out.html")])
    assert result.exit_code == 0, result.output
    text = " ".join(check((tmp_path / "out.html").read_text("utf-8")).text)
    assert "Tiers of one sequence, kv=auto" in text
    assert "KV cache quality: reference" in text
    for place in (tmp_path, tmp_path / "none" / "out.html"):
        refused = CliRunner().invoke(app, [*command, "--report", str(place)])
        assert refused.exit_code == 2
