"""A few damaged files of each kind; `python tests/fuzz.py --minutes=30` tries as many as you have time for."""
import fuzz
import pytest


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_damaged_files_are_read_right_or_refused_by_name(tmp_path, kind):
    assert fuzz.fuzz(fuzz.Config(n=3, kinds=kind, out=str(tmp_path))) == []
