"""lib/ serves three systems and knows none of them."""
import ast
from pathlib import Path

LIB = Path(__file__).parent.parent / "lib"


def test_lib_imports_no_system():
    systems = {path.stem for path in LIB.parent.glob("*.py")} | {"argaze", "unigaze"}
    for path in LIB.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            assert not {name.split(".")[0] for name in names} & systems, f"{path.name} imports {names}"
