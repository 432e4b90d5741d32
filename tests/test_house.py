"""The order of the house: imports point left only, files and functions stay readable, nothing unsafe is loaded."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ORDER = [
    "errors",
    "files",
    "arguments",
    "pictures",
    "yaml12",
    "options",
    "sections",
    "config",
    "run_checks",
    "checks",
    "cli",
    "log",
    "tokenizer",
    "data",
    "parallel",
    "model",
    "optim",
    "checkpoint",
    "hf",
    "adapt",
    "generate",
    "plan",
    "train",
    "evaluate",
]
SOURCES = sorted(
    [*ROOT.glob("megapoly/**/*.py"), *ROOT.glob("kernels/megapoly_kernels/*.py"), *ROOT.glob("tools/*.py")]
)
# The shell scripts among the examples are Python as well, after a string that holds their shell part.
LOADERS = [*SOURCES, *sorted([*ROOT.glob("examples/*.py"), *ROOT.glob("examples/*.sh"), ROOT / "setup.py"])]
UNSAFE_MODULES = {"pickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "jsonpickle", "code"}
UNSAFE_CALLS = {
    "eval", "exec", "compile", "__import__", "torch.load", "np.load", "numpy.load", "os.system", "os.popen",
    "yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "tarfile.open", "zipfile.ZipFile",
    "shutil.unpack_archive", "torch.hub.load", "runpy.run_path",
}  # fmt: skip
UNSAFE_KEYWORDS = {"trust_remote_code", "allow_pickle"}


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, "relative imports hide the order"
            yield node.module


def part(path: Path) -> str:
    """`data` for megapoly/data/batch.py, `cli` for megapoly/cli.py."""
    relative = path.relative_to(ROOT / "megapoly")
    return relative.parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", [p for p in SOURCES if p.is_relative_to(ROOT / "megapoly")], ids=str)
def test_imports_point_left(path: Path) -> None:
    here = part(path)
    if here == "__init__":
        return
    for module in imported(ast.parse(path.read_text(encoding="utf-8"))):
        if module.startswith("megapoly."):
            there = module.split(".")[1]
            assert ORDER.index(there) <= ORDER.index(here), f"{path.name} ({here}) imports {module}"
            assert (here, there) not in (("optim", "model"), ("checkpoint", "model"), ("data", "parallel"))
        if module.split(".")[0] == "megapoly_kernels":
            # A linear layer adds its weight's gradient to main_grad with the operation of the fused loss.
            is_shared = here == "parallel" and module == "megapoly_kernels.accumulate"
            assert here in ("model", "optim") or is_shared, f"{here} imports {module}; only model and optim may"


def test_kernels_import_torch_and_triton_alone() -> None:
    allowed = {"torch", "triton", "megapoly_kernels", *sys.stdlib_module_names}
    if_chosen = {"flash_attn", "apex"}  # inside the function that runs where a backend of that name is asked for
    for path in ROOT.glob("kernels/megapoly_kernels/*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {module.split(".")[0] for module in imported(tree)}
        assert names <= allowed | if_chosen, f"{path.name} imports {names - allowed}"
        at_once = {module.split(".")[0] for node in tree.body for module in imported(ast.Module([node], []))
                   if isinstance(node, (ast.Import, ast.ImportFrom))}  # fmt: skip
        assert not at_once & if_chosen, f"{path.name} needs {at_once & if_chosen}"


def test_kernels_folder_is_no_package() -> None:
    # A package named `kernels` would shadow Hugging Face's, which setuptools loads on every build.
    assert not (ROOT / "kernels/__init__.py").exists()


@pytest.mark.parametrize(
    "module", ["megapoly.config", "megapoly.cli", "megapoly.checks", "megapoly.data.curriculum",
               "megapoly.data.preprocess", "megapoly.data.loader", "megapoly.tokenizer.load", "megapoly.data.clean.report",
               "megapoly.data.clean.executors"],
)  # fmt: skip
def test_data_side_needs_no_torch(module: str) -> None:
    code = f"import {module}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_stay_readable(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= (80 if path.parent.name == "tools" else 400)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno < 60, f"{node.name} is too long"


def unsafe(tree: ast.AST) -> Iterator[str]:
    """What in a file could execute, or let execute, what it loads."""
    yield from UNSAFE_MODULES & {module.split(".")[0] for module in imported(tree)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            keywords = {keyword.arg for keyword in node.keywords}
            if name in UNSAFE_CALLS or (keywords - {None}) & UNSAFE_KEYWORDS:
                yield f"line {node.lineno}: {name}"
            if name.endswith("import_module") and not all(isinstance(word, ast.Constant) for word in node.args):
                yield f"line {node.lineno}: a module by a name that is found"
            if "shell" in keywords and name.startswith("subprocess."):
                yield f"line {node.lineno}: a shell"
        if isinstance(node, (ast.Name, ast.Attribute)) and ast.unparse(node).endswith(("UnsafeLoader", "FullLoader")):
            yield f"line {node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize("path", LOADERS, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_that_is_loaded_can_execute(path: Path) -> None:
    found = [*unsafe(ast.parse(path.read_text(encoding="utf-8")))]
    # Tests ask for the native sampler by another name, to see what its absence says.
    assert [line for line in found if path.name != "native.py" or "a module by a name" not in line] == []


@pytest.mark.parametrize(
    "line",
    ["import pickle", "from dill import loads", "eval(x)", "yaml.load(x, Loader=yaml.Loader)", "class L(yaml.FullLoader): 0",
     "AutoModel.from_pretrained(x, trust_remote_code=True)", "torch.load(x)", "subprocess.run(x, shell=True)",
     "importlib.import_module(state[0])"],
)  # fmt: skip
def test_unsafe_lines_are_seen(line: str) -> None:
    assert [*unsafe(ast.parse(line))]


def test_public_functions_say_what_they_do() -> None:
    silent = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
        for path in SOURCES
        if path.parent.name != "tools"
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
        and not node.name.startswith("_")
        and ast.get_docstring(node) is None
    ]
    assert not silent
