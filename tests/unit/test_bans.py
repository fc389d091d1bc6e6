"""What the code may not say anywhere: calls that run what they read, or read what they should refuse.

One place per hazard, and this test to keep it so (section 6 of the reliability notes). Names are found in the syntax
tree, so that comments and strings may speak of them.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted([*(ROOT / "src").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")])
MODULES = frozenset({"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "telnetlib"})
CALLS = {
    "eval": "runs text",
    "exec": "runs text",
    "os.system": "a shell",
    "os.popen": "a shell",
    "os.tempnam": "a race",
    "tempfile.mktemp": "a race",
    "yaml.load": "builds objects",
    "yaml.unsafe_load": "builds objects",
    "yaml.full_load": "builds objects",
    "torch.hub.load": "runs what it fetches",
    "pandas.read_pickle": "a pickle",
    "pd.read_pickle": "a pickle",
    "ssl._create_unverified_context": "no certificate",
    "torch.jit.load": "runs a program",
}
METHODS = {"extractall": "writes where the archive says"}
OPTIONS = {
    ("weights_only", False): "a pickle without restriction",
    ("shell", True): "a shell",
    ("verify", False): "no certificate",
    ("allow_pickle", True): "a pickle",
    ("trust_remote_code", True): "runs what it fetches",
    ("force", True): "anything passes for DICOM",
}
SETTINGS = frozenset({"LOAD_TRUNCATED_IMAGES", "MAX_IMAGE_PIXELS", "MAX_TEXT_MEMORY", "MAX_TEXT_CHUNK"})
ALLOWED = {("torch.load", "src/hilum/backbones/pickled.py")}
"""The one place of a hazard; it has tests of its own."""


def dotted(node: ast.expr) -> str:
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def violations(text: str, path: str = "") -> list[str]:
    """What is banned in a file, as "line: what"."""
    found = []
    for node in ast.walk(ast.parse(text)):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [one.name for one in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [f"{line}: imports {name}" for name in names if name.split(".")[0] in MODULES]
        if isinstance(node, ast.Call):
            name = dotted(node.func)
            if name in CALLS:
                found.append(f"{line}: {name} ({CALLS[name]})")
            if name == "torch.load" and (name, path) not in ALLOWED:
                found.append(f"{line}: torch.load outside its one place")
            if isinstance(node.func, ast.Attribute) and node.func.attr in METHODS:
                found.append(f"{line}: {node.func.attr} ({METHODS[node.func.attr]})")
            for option in node.keywords:
                if isinstance(option.value, ast.Constant) and (option.arg, option.value.value) in OPTIONS:
                    if option.arg == "force" and "dcmread" not in name:
                        continue
                    found.append(
                        f"{line}: {option.arg}={option.value.value} ({OPTIONS[option.arg, option.value.value]})"
                    )
        if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [dotted(target).rpartition(".")[2] for target in targets if isinstance(target, ast.Attribute)]
            found += [f"{line}: sets {name} of Pillow" for name in names if name in SETTINGS]
        if isinstance(node, ast.ExceptHandler):
            silent = all(isinstance(one, ast.Pass) for one in node.body)
            broad = node.type is None or dotted(node.type) in ("Exception", "BaseException")
            if node.type is None or (silent and broad):
                found.append(f"{line}: an except that hides everything")
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda one: one.relative_to(ROOT).as_posix())
def test_nothing_banned(file: Path) -> None:
    assert violations(file.read_text(encoding="utf-8"), file.relative_to(ROOT).as_posix()) == []


PLANTED = [
    "import pickle",
    "from joblib import load",
    "import torch\ntorch.load(f, weights_only=True)",
    "x(weights_only=False)",
    "yaml.load(f)",
    "eval('1')",
    "exec(code)",
    "archive.extractall(folder)",
    "run(command, shell=True)",
    "os.system('x')",
    "pydicom.dcmread(f, force=True)",
    "ImageFile.LOAD_TRUNCATED_IMAGES = True",
    "Image.MAX_IMAGE_PIXELS = None",
    "get(url, verify=False)",
    "try:\n    x()\nexcept:\n    pass",
    "try:\n    x()\nexcept Exception:\n    pass",
    "try:\n    x()\nexcept:\n    raise",
    "np.load(f, allow_pickle=True)",
    "from_pretrained(x, trust_remote_code=True)",
    "import marshal",
    "tempfile.mktemp()",
    "torch.jit.load(f)",
]


@pytest.mark.parametrize("text", PLANTED)
def test_what_is_banned_is_found(text: str) -> None:
    assert violations(text)


@pytest.mark.parametrize(
    "text",
    [
        "model.eval()",
        "'''eval(x)'''",
        "# pickle",
        "yaml.safe_load(f)",
        "copy(force=True)",
        "np.load(f, allow_pickle=False)",
        "torch.load(f, weights_only=True)",
        "try:\n    x()\nexcept ValueError:\n    pass",
        "run(command)",
    ],
)
def test_what_is_not_is_not(text: str) -> None:
    assert violations(text, "src/hilum/backbones/pickled.py") == []
