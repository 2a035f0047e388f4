"""What README and docs say of time, memory and errors comes from the records in benchmarks/results."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import figure_tables, figures, records

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "docs").is_dir():
    pytest.skip("needs a checkout: the pages are not packaged", allow_module_level=True)

PAGES = [page for page in figures.pages() if page.name != "changelog.md"]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
FENCE = re.compile(r"^(```+)[^\n`]*\n.*?^\1 *$", re.M | re.S)
CODE = re.compile(r"(`+)(?!`).+?(?<!`)\1(?!`)")
CLAIM = re.compile(
    r"\b\d[\d.,]*(?:\s*%|\s+times\b|\s*MiB\b|\s*ms\b|\s+s\b|e-\d+|\s+images (?:a|per) second)"
    r"|\b(?:half|twice|a (?:third|quarter|fifth|tenth|\w+th) of) (?:of )?the (?:time|memory)\b"
)
# A part of a line, and why its number is no measurement, or where a test has it.
NOT_MEASURED = {
    "at most 16 MiB (32 MiB in half": "a threshold in attention/chunked.py",
    "up to 16 MiB for the whole batch (32 MiB in half": "the same",
    "1 MiB at 32x32, 16 MiB at 64x64, 256 MiB at 128x128": "arithmetic: L x S numbers of 4 bytes",
    "1 MiB at 32x32 positions with `pool_size=2`, 16 MiB at 64x64": "the same",
    "On maps of 16 MiB or less": "a size",
    "the large map takes 32 MiB or more": "a threshold in resampling/table.py",
    "right to 2e-6 (a test)": "tests/ops/test_conditional_norm_backends.py",
    "off by up to 1e-3": "the same test's other side",
    "to 1e-5 in float32 and 1e-12 in float64": "bounds of tests/ops/test_resampling_backends.py",
    "agree to 1e-11 (a test)": "tests/examples/test_distributed_training.py",
    "layers 1e-5; gradients": "tolerances of tests/test_golden.py",
    "and whole networks 1e-4": "the same",
    "that is above 1e-4": "a bound of cli/export.py",
    "In ONNX float16 does (6e-4)": "the size of float16's rounding",
    "losses up to 2e-2 off": "a limit of the trainer, not of the blocks",
    "5.7 times smaller": "arithmetic: the root of 32",
    "iterates u 15 times": "torch's code",
    "moves each by\n  0.2% a step": "arithmetic: Adam's rate over the weights' size",
    "they move by 3% a step at 64 channels and by 8% at 512": "the same",
    "and 256 times\n  that time": "arithmetic: the square of the area",
    "is 30% shorter": "arithmetic: the mean of two normal vectors",
    "(67% : 33% and so on)": "arithmetic: thirds",
    "differ less than 5% as much": "a threshold of train/health.py",
    "gets worse 5 times in a row": "the same",
    "if more than 1% of the images": "a threshold of data/workers.py",
    "with 15% of room": "a margin of train/memory.py",
    "Adam betas (0, 0.999), eps 1e-8 for Adam and SN, 1e-5 for batch norm": "settings",
    "Adam 1e-4 for G and 4e-4 for D": "settings",
    "0.1 and 1e-5, unless you set them": "settings",
    "1e-8 in its SAGAN script, 1e-6 in BigGAN's": "settings",
    "1e-8 in its SAGAN script and 1e-6 in BigGAN's": "settings",
    "(1e-12 by default)": "a setting",
    "from at most 16\ntimes the base width": "the rule of the networks",
}


def claims(text: str) -> list[str]:
    """Return what claims a measurement outside the markers, code and the allowed phrases."""
    text = FENCE.sub("", figures.MARKER.sub("", text))
    for phrase in NOT_MEASURED:
        text = text.replace(phrase, "")
    return [match[0] for match in CLAIM.finditer(CODE.sub("", text))]


@every_page
def test_figures_are_what_the_records_say(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert figures.written(text) == text, "run python -m benchmarks.figures"


@every_page
def test_no_measurement_stands_outside_the_markers(page: Path) -> None:
    found = claims(page.read_text(encoding="utf-8"))
    assert not found, (
        f"{found}: cite a figure (benchmarks/README.md), or say in NOT_MEASURED why it is no measurement"
    )


@every_page
def test_a_marker_does_not_start_a_line_of_prose(page: Path) -> None:
    """Markdown would take such a line as HTML."""
    text = page.read_text(encoding="utf-8")
    assert re.findall(r"^<!-- figure: \S+ -->[^\n]", text, re.M) == []
    assert text.count("<!-- figure") == len(figures.MARKER.findall(text)) == text.count("<!-- /figure -->")


def test_every_figure_is_cited_and_every_exception_needed() -> None:
    texts = [page.read_text(encoding="utf-8") for page in PAGES]
    assert set(figures.TEXTS) == {name for text in texts for name, _ in figures.MARKER.findall(text)}
    assert [phrase for phrase in NOT_MEASURED if not any(phrase in text for text in texts)] == []


@pytest.mark.parametrize(
    "claim",
    [
        "2 to 5% slower",
        "2.1 times as fast",
        "half the time",
        "a fifteenth of the memory",
        "takes 206 MiB",
        "in 3 ms",
    ],
)
def test_a_claim_is_found_in_prose_and_not_in_a_marker_or_code(claim: str) -> None:
    assert claims(f"This is {claim} than that.")
    assert not claims(f"<!-- figure: sn.ours -->{claim}<!-- /figure --> and `{claim}`\n```sh\n{claim}\n```\n")


def test_an_unknown_figure_is_an_error_that_names_the_known_ones() -> None:
    with pytest.raises(LookupError, match=r"no figure is called 'nn.ours'.* sn.ours"):
        figures.written("<!-- figure: nn.ours --><!-- /figure -->")


def test_a_figure_follows_its_record(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [
        {
            "environment": {"freed_memory": state},
            "cases": [
                {
                    "suite": figure_tables.SN,
                    "case": "batch 8",
                    "contenders": {"ours: shared": {"status": "ok", "time_ratio": ratio}},
                }
            ],
        }
        for state, ratio in (("returned", 1.9), ("returned", 0.97), ("kept", 1.204))
    ]
    monkeypatch.setattr(records, "record", {"spectral_norm_cpu": {"runs": runs}}.__getitem__)
    text = figures.written("adds <!-- figure: sn.ours.batch8 -->2 to 5%<!-- /figure -->")
    assert text == "adds <!-- figure: sn.ours.batch8 -->−3 to 20%<!-- /figure -->"


def test_check_fails_where_a_page_differs_and_writing_mends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text("a <!-- figure: sn.ours -->half<!-- /figure -->")
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    monkeypatch.setattr(figures, "pages", lambda: [page])
    assert figures.main(["--check"]) == 1
    assert "Differs: page.md" in capsys.readouterr().out
    assert figures.main([]) == 0
    assert figures.main(["--check"]) == 0
