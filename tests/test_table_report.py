"""A table's report: means with their spread beside the paper's numbers, and nothing made up where there is none."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from avlit.metrics.picture import psnr
from avlit.paper_table import Extent, Metric, PaperTable, Published
from avlit.table_report import TableReport

WHOLE = Extent(("0", "5"), (0, 1), {})
TABLE = PaperTable(
    key="jova_lambda",
    about="Weight",
    paper="JoVA, Table 3",
    stage="jova_stage2",
    shared={},
    rows={"0": {"mouth_weight": "0"}, "5": {"mouth_weight": "5"}},
    full=WHOLE,
    quick=WHOLE,
    metrics=(
        Metric("lip_sync", "higher", "LSE-C", "correlation"),
        Metric("words", "higher", "WER", ""),
        Metric("chance", "none", None, ""),
    ),
    published=(
        Published("LSE-C", "higher", {"0": 1.39, "5": 6.64}),
        Published("WER", "lower", {"0": 0.18, "5": 0.18}),
        Published("FD", "lower", {"5": 0.69}),
    ),
)
RESULTS = {"0": {0: {"lip_sync": 0.1, "words": 0.5}, 1: {"lip_sync": 0.3}}, "5": {0: {"lip_sync": 0.7, "chance": 0.0}}}
REPORT = TableReport(TABLE, ("0", "5"), RESULTS, "Two seeds.")


def test_means_and_spreads_stand_above_the_papers_numbers():
    text = REPORT.markdown()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    assert rows == [
        ["mouth_weight", "0", "5"],
        ["lip_sync ↑", "0.200 ± 0.141", "0.700 (one seed)"],
        ["paper: LSE-C ↑", "1.39", "6.64"],
        ["words ↑", "0.500 (one seed)", "not measured"],
        ["paper: WER ↓", "0.18", "0.18"],
        ["chance", "not measured", "0.000 (one seed)"],
        ["paper: FD ↓", "not given", "0.69"],
    ]
    assert "- not measured here: FD\n" in text
    assert "lip_sync is best at 5, the paper's LSE-C at 5." in text
    assert "words is best" not in text  # one row alone has been measured


def test_a_report_leaves_text_numbers_and_a_picture(tmp_path: Path):
    text, numbers, picture = REPORT.write(tmp_path)
    assert text.read_text("utf-8") == REPORT.markdown()
    values = json.loads(numbers.read_text("utf-8"))
    assert values["measured"]["0"]["lip_sync"] == pytest.approx({"mean": 0.2, "spread": 0.1414213, "seeds": 2})
    assert values["measured"]["5"]["words"] is None
    assert values["seeds"]["0"]["1"] == {"lip_sync": 0.3}
    assert values["published"]["LSE-C"] == {"better": "higher", "0": 1.39, "5": 6.64}
    assert min(Image.open(picture).size) > 300
    assert sorted(path.name for path in tmp_path.iterdir()) == ["table.json", "table.md", "table.png"]


def test_rows_that_are_equally_good_are_all_named():
    assert REPORT.best(TABLE.published[1]) == "0 and 5"
    assert REPORT.best(TABLE.metrics[2]) is None


def test_psnr_counts_only_what_it_is_told_to():
    truth = torch.zeros(3, 2, 4, 4)
    video = truth.clone()
    video[:, 1, :2] = 0.2
    everything, upper = torch.ones(2, 4, 4, dtype=torch.bool), torch.zeros(2, 4, 4, dtype=torch.bool)
    upper[1, :2] = True
    assert psnr(video, truth, counted=upper) == pytest.approx(20.0)  # an error of a tenth of the peak
    assert psnr(video, truth, counted=everything) == pytest.approx(20 + 10 * torch.log10(torch.tensor(4.0)).item())
    assert psnr(video, truth, counted=~upper) == 100
    with pytest.raises(ValueError, match="no pixel is counted"):
        psnr(video, truth, counted=torch.zeros(2, 4, 4, dtype=torch.bool))
