import math
from pathlib import Path

import numpy as np
import pytest

from grouprl.errors import UsageError
from grouprl.runs import MetricsLog, read_metrics

AWKWARD = [0.1, 1 / 3, 1e-300, 1e22, -0.0, float(np.float32(0.1)), math.inf, -math.inf, 5e-324]


def test_floats_come_back_exactly(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "m.csv") as log:
        for step, value in enumerate(AWKWARD):
            log.append({"step": step, "value": value})
    columns = read_metrics(tmp_path / "m.csv")
    assert columns["value"].dtype == np.float64
    assert columns["value"].tobytes() == np.array(AWKWARD).tobytes()
    assert columns["step"].tolist() == list(range(len(AWKWARD)))


def test_the_text_is_a_header_and_one_line_a_row(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "m.csv") as log:
        log.append({"update": 0, "step": np.int64(2048), "return_mean": None, "loss": np.float32(0.5)})
        log.append({"update": 1, "step": 4096, "return_mean": 0.1})
        log.append({"update": 2, "step": 6144, "return_mean": math.nan, "loss": True})
    assert (tmp_path / "m.csv").read_bytes() == (
        b"update,step,return_mean,loss\n0,2048,,0.5\n1,4096,0.1,\n2,6144,nan,1\n"
    )
    assert np.isnan(read_metrics(tmp_path / "m.csv")["return_mean"]).tolist() == [True, False, True]


def test_a_key_that_comes_later_adds_a_column_that_is_blank_before(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "m.csv") as log:
        log.append({"step": 1})
        log.append({"step": 2, "eval_return": 9.5})
        log.append({"step": 3})
        assert log.columns == ("step", "eval_return")
    assert (tmp_path / "m.csv").read_text() == "step,eval_return\n1,\n2,9.5\n3,\n"


def test_each_row_can_be_read_as_soon_as_it_is_appended(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "m.csv")
    for step in range(3):
        log.append({"step": step})
        assert read_metrics(tmp_path / "m.csv")["step"].tolist() == list(range(step + 1))
    log.close()


def test_a_log_that_is_opened_again_goes_on(tmp_path: Path) -> None:
    for step in range(3):
        with MetricsLog(tmp_path / "m.csv") as log:
            log.append({"step": step, "a,b": 1.5})
    assert read_metrics(tmp_path / "m.csv")["step"].tolist() == [0, 1, 2]
    assert read_metrics(tmp_path / "m.csv")["a,b"].tolist() == [1.5, 1.5, 1.5]


@pytest.mark.parametrize("torn", ["3", "3,0.", "3,0.25"])
def test_a_torn_last_line_is_dropped_on_open_and_left_out_on_reading(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "m.csv"
    path.write_text("step,value\n1,0.5\n2,0.75\n" + torn)
    assert read_metrics(path)["step"].tolist() == [1, 2]
    with MetricsLog(path) as log:
        log.append({"step": 3, "value": 0.25})
    assert path.read_text() == "step,value\n1,0.5\n2,0.75\n3,0.25\n"


def test_a_torn_header_starts_a_new_file(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    path.write_text("step,val")
    with MetricsLog(path) as log:
        log.append({"step": 1})
    assert path.read_text() == "step\n1\n"


def test_truncation_then_appending_gives_the_file_of_a_run_that_was_never_interrupted(tmp_path: Path) -> None:
    rows = [{"step": 10 * i, "value": 1 / (i + 1), **({"late": 2.5} if i >= 4 else {})} for i in range(8)]
    with MetricsLog(tmp_path / "whole.csv") as log:
        for row in rows:
            log.append(row)
    with MetricsLog(tmp_path / "resumed.csv") as log:
        for row in rows[:6]:
            log.append(row)
        log.truncate_after("step", 20)
        assert read_metrics(log.path)["step"].tolist() == [0, 10, 20]
        for row in rows[3:]:
            log.append(row)
    assert (tmp_path / "resumed.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_truncation_keeps_rows_up_to_the_value_and_blanks(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("step,v\n1,\n2,0.1\n,7\n3,0.2\n")
    log = MetricsLog(tmp_path / "m.csv")
    log.truncate_after("step", 2)
    assert (tmp_path / "m.csv").read_text() == "step,v\n1,\n2,0.1\n,7\n"
    log.truncate_after("step", 0)
    log.truncate_after("v", 0)
    assert (tmp_path / "m.csv").read_text() == "step,v\n"
    assert read_metrics(tmp_path / "m.csv")["step"].shape == (0,)


def test_truncation_by_a_column_there_is_not_names_those_there_are(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "m.csv")
    log.truncate_after("step", 1)  # nothing logged, nothing to drop
    log.append({"update": 1, "loss": 0.5})
    with pytest.raises(UsageError, match="update, loss"):
        log.truncate_after("step", 1)
    log.close()


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"a,b\n1,2,3\n", "line 2"), (b"a\nhello\n", "'hello'"), (b"\xff\xfe\x00\n", "not text")],
    ids=["ragged", "words", "binary"],
)
def test_a_foreign_file_is_a_usage_error_naming_it(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "m.csv").write_bytes(content)
    with pytest.raises(UsageError, match=words) as caught:
        read_metrics(tmp_path / "m.csv")
    assert "m.csv" in str(caught.value)


def test_a_missing_file_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no metrics file"):
        read_metrics(tmp_path / "m.csv")
