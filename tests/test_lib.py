"""lib/ serves three systems and knows none of them."""
import ast
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lib import cuda_graph, run

LIB = Path(__file__).parent.parent / "lib"


def test_lib_imports_no_system():
    systems = {path.stem for path in LIB.parent.glob("*.py")} | {"argaze", "unigaze"}
    for path in LIB.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            assert not {name.split(".")[0] for name in names} & systems, f"{path.name} imports {names}"


@pytest.mark.parametrize("has_mps, has_cuda, expected", [
    (False, False, "cpu"), (True, False, "mps"), (True, True, "cuda:0")])
def test_the_device_is_chosen_by_what_there_is(has_mps, has_cuda, expected, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: has_mps)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    assert str(run.init_processes("auto")[2]) == expected


def test_a_cuda_graph_is_recorded_for_what_comes_twice(monkeypatch):
    """And the one that was needed longest ago is dropped."""
    recorded = []
    graph = SimpleNamespace(replay=lambda: None)
    monkeypatch.setattr(cuda_graph, "MOST_GRAPHS", 2)
    monkeypatch.setattr(cuda_graph, "graphs", {})
    monkeypatch.setattr(cuda_graph, "record", lambda work, x: recorded.append(x.item()) or (graph, x, {"y": x}))
    for number in (1, 2, 1, 1, 3, 1, 2, 2, 1):
        x = torch.tensor(float(number))
        y = cuda_graph.replay(lambda x: {"y": x}, x, number, torch.nn.Identity())
        assert y["y"] == number
    assert recorded == [1, 2]
