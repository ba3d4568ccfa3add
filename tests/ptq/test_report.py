import dataclasses
import json

import pytest

from lowbit_jax.models.llama import QUANTIZABLE_PATHS
from lowbit_jax.ptq.calibrate import MatrixReport
from lowbit_jax.ptq.report import REPORTS, reasons_table, report_table, save_report

PATHS = [path.removeprefix("layers/").removesuffix("/weight") for path in QUANTIZABLE_PATHS]


def reports(**fields):
    found = []
    for layer in range(3):
        scaled = {name: value * (layer + 1) for name, value in fields.items()}
        for number, path in enumerate(PATHS):
            error = 0.01 * (layer + 1) + 0.001 * number
            found.append(MatrixReport(layer, path, error, 0.01, 0, 0.5, **scaled))
    return found


ALL = {
    "weight_kurtosis": 3.0, "weight_max_to_rms": 5.0, "input_max_to_rms": 10.0,
    "input_max_to_median": 1e3, "scale_min": 1e-3, "scale_median": 2e-3, "scale_max": 4e-3,
    "zero_codes": 0.1, "limit_codes": 0.05,
}  # fmt: skip


def test_reasons_are_the_worst_over_the_layers_and_shares_the_median():
    lines = reasons_table(reports(**ALL)).split("\n")
    assert len(lines) == 1 + 7 + 2
    row = lines[1].split()
    assert row[:3] == ["q_proj", "3.000", "2"]  # 3 %, of the last layer
    assert row[3:] == ["9.0", "15.0", "30.0", "3e+03", "1.00e-03", "4.00e-03", "1.20e-02",
                       "20.00", "10.00"]  # fmt: skip


def test_columns_that_nobody_has_are_left_out():
    text = reasons_table(reports())
    assert "kurtosis" not in text
    assert "3.600" in text.split("\n")[7]  # of the last matrix, in percent
    some = [dataclasses.replace(reports()[0], weight_kurtosis=3.0), *reports()[1:]]
    assert reasons_table(some).split("\n")[2].split()[-1] == "-"


@pytest.mark.parametrize("fields", [ALL, {}, {**ALL, "zero_codes": 0.0}], ids=["all", "few", "0"])
def test_three_files_are_written(tmp_path, fields):
    rows = reports(**fields)
    rows[0] = dataclasses.replace(rows[0], error=0.0)  # has no logarithm
    (tmp_path / "floats").mkdir()
    save_report(tmp_path / "floats", rows, {"bits_per_weight": 4.25, "store": "floats"})
    floats = (tmp_path / "floats" / "report.txt").read_text()
    assert "4.250 bits a weight as codes; written are float32" in floats
    save_report(tmp_path, rows, {"bits_per_weight": 4.25})
    assert sorted(path.name for path in tmp_path.glob("report*")) == sorted(REPORTS)
    record = json.loads((tmp_path / "report.json").read_text())
    assert [MatrixReport(**row) for row in record["matrices"]] == rows
    text = (tmp_path / "report.txt").read_text()
    assert report_table(rows) in text
    assert text.endswith("4.250 bits a weight\n")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
