"""JSON lines of metrics: on a disk without room the run ends with a message."""

from pathlib import Path

import pytest

from autosp_aot.errors import AutospError
from autosp_aot.training.log import Log


def test_a_full_disk_is_said(capsys):
    log = Log(2, Path("/dev/full"))
    with pytest.raises(AutospError) as caught:
        log.step(1, 1.0, 1.0, 0.1, 5.0)
    assert str(caught.value) == (
        "error[output-unwritable]: --metrics /dev/full cannot be written\n"
        "  why    No space left on device\n"
        "  fix    give a file on a disk with room, or leave --metrics out: the same numbers are on stdout"
    )


def test_a_folder_is_no_file_of_metrics(tmp_path):
    with pytest.raises(AutospError, match="cannot be written\n  why    Is a directory"):
        Log(2, tmp_path)
