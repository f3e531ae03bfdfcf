"""A few damaged files of each kind; `python tests/fuzz.py --minutes=30` tries as many as you have time for."""
import fuzz
import fuzz_runs
import pytest

# the kinds of fuzz_runs share what they need, which takes seconds to make
KINDS = [kind for kind in fuzz.KINDS if kind not in fuzz_runs.KINDS] + [",".join(fuzz_runs.KINDS)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kinds", KINDS)
def test_damaged_files_are_read_right_or_refused_by_name(tmp_path, kinds):
    assert fuzz.fuzz(fuzz.Config(n=3, kinds=kinds, out=str(tmp_path))) == []
