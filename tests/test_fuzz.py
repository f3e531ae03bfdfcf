"""A few damaged files of each kind; `python tests/fuzz.py --minutes=30` tries as many as you have time for."""
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import fuzz
import fuzz_runs
import pytest
import torch

# the kinds of fuzz_runs share what they need, which takes seconds to make
KINDS = [kind for kind in fuzz.KINDS if kind not in fuzz_runs.KINDS] + [",".join(fuzz_runs.KINDS)]


@pytest.fixture(scope="module")
def process():
    """The fuzzer forks, and a child of a process with other threads, as this one may have by now, can hang."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield pool


@pytest.mark.parametrize("kinds", KINDS)
def test_damaged_files_are_read_right_or_refused_by_name(process, tmp_path, kinds):
    assert process.submit(fuzz.fuzz, fuzz.Config(n=3, kinds=kinds, out=str(tmp_path))).result() == []
