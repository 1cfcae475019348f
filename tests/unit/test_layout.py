"""The repository's shape: who may import whom, what a wheel holds, what an import costs."""

import ast
import json
import re
import subprocess
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import streamgen
from streamgen import resources
from streamgen.errors import UserError

RunPython = Callable[..., subprocess.CompletedProcess[str]]

ROOT = Path(__file__).resolve().parents[2]
OUTER = ("kernels", "train", "distill", "infer")
PACKAGES = {"streamgen": ROOT / "streamgen"} | {
    f"streamgen_{outer}": ROOT / outer / f"streamgen_{outer}" for outer in OUTER
}
# package -> the other packages that any of its files may import, anywhere
ALLOWED = {
    "streamgen_kernels": set[str](),
    "streamgen": set[str](),
    "streamgen_train": {"streamgen"},
    "streamgen_distill": {"streamgen", "streamgen_train"},
    "streamgen_infer": {"streamgen"},
}
# file -> what it may import besides: (packages, only inside a function)
DOORS = {
    "streamgen/ops.py": ({"streamgen_kernels"}, False),
    "streamgen/__main__.py": ({"streamgen_infer"}, False),
    "infer/streamgen_infer/cli.py": ({"streamgen_train", "streamgen_distill"}, True),
}


def imports(source: str) -> Iterator[tuple[int, str, bool]]:
    """(line, top-level name, inside a function?) of every absolute import, by any spelling."""

    def walk(node: ast.AST, lazy: bool) -> Iterator[tuple[int, str, bool]]:
        names: list[str] = []
        match node:
            case ast.Import():
                names = [alias.name for alias in node.names]
            case ast.ImportFrom(level=0, module=str(module)):
                names = [module]
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(module)), *_],
            ):
                names = [module]
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda():
                lazy = True
        for name in names:
            yield node.lineno, name.split(".")[0], lazy
        for child in ast.iter_child_nodes(node):
            yield from walk(child, lazy)

    yield from walk(ast.parse(source), lazy=False)


def breaches(package: str, path: str, source: str) -> list[str]:
    """What this file of `package` imports against the rule."""
    allowed = ALLOWED[package] | {package}
    door, door_is_lazy = DOORS.get(path, (set[str](), False))
    found = []
    for line, name, lazy in imports(source):
        ours = name in PACKAGES or name in OUTER
        if not ours or name in allowed or (name in door and (lazy or not door_is_lazy)):
            continue
        found.append(f"{path}:{line} imports {name}")
    return found


def test_imports_go_in_one_direction() -> None:
    found = [
        breach
        for package, folder in PACKAGES.items()
        for file in sorted(folder.rglob("*.py"))
        for breach in breaches(package, file.relative_to(ROOT).as_posix(), file.read_text())
    ]
    assert not found


@pytest.mark.parametrize(
    ("package", "path", "source", "refused"),
    [
        ("streamgen", "streamgen/flow.py", "import streamgen_train.loop", True),
        ("streamgen", "streamgen/flow.py", "def f():\n    import streamgen_infer", True),
        ("streamgen", "streamgen/flow.py", "from streamgen_kernels import rope", True),
        ("streamgen", "streamgen/ops.py", "from streamgen_kernels import rope", False),
        ("streamgen_kernels", "k.py", "from streamgen.rope import rope_table", True),
        ("streamgen_train", "t.py", "from streamgen_distill import dmd", True),
        ("streamgen_train", "t.py", "import importlib\nimportlib.import_module('infer.x')", True),
        ("streamgen_distill", "d.py", "from streamgen_train.ema import Ema", False),
        ("streamgen_infer", "i.py", "def f():\n    import streamgen_train", True),
        ("streamgen_infer", "infer/streamgen_infer/cli.py", "import streamgen_train", True),
        (
            "streamgen_infer",
            "infer/streamgen_infer/cli.py",
            "def f():\n    from streamgen_train.main import main",
            False,
        ),
        ("streamgen_infer", "i.py", "from kernels import get_kernel", True),
        ("streamgen_infer", "i.py", "from . import cli\nimport torch", False),
    ],
)
def test_the_import_rule_itself(package: str, path: str, source: str, refused: bool) -> None:
    assert bool(breaches(package, path, source)) is refused


@pytest.mark.parametrize("outer", OUTER)
def test_outer_folder_holds_exactly_its_package(outer: str) -> None:
    assert not (ROOT / outer / "__init__.py").exists()
    modules = {path.relative_to(ROOT / outer).parts[0] for path in (ROOT / outer).rglob("*.py")}
    assert modules == {f"streamgen_{outer}"}


@pytest.mark.parametrize("outer", OUTER)
def test_readme_names_files_that_exist(outer: str) -> None:
    text = (ROOT / outer / "README.md").read_text()
    assert len(text.splitlines()) <= 40  # one screen
    for name in re.findall(r"`([\w/]+\.py)`", text):
        assert (ROOT / name if "/" in name else PACKAGES[f"streamgen_{outer}"] / name).is_file()


@pytest.mark.parametrize("package", PACKAGES)
def test_package_says_what_is_inside_and_is_typed(package: str) -> None:
    init = PACKAGES[package] / "__init__.py"
    assert ast.get_docstring(ast.parse(init.read_text()))
    assert (PACKAGES[package] / "py.typed").is_file()


def test_real_kernels_package_wins_over_our_folder(run_python: RunPython, tmp_path: Path) -> None:
    """diffusers and transformers probe for a package called `kernels`; ours must not answer."""
    probe = "import importlib.util as u; spec = u.find_spec('kernels'); print(spec and spec.origin)"
    alone = run_python("-c", probe, cwd=ROOT)
    assert alone.stdout.strip() == "None", alone  # no module, or a folder without code

    (tmp_path / "kernels").mkdir()
    real = tmp_path / "kernels" / "__init__.py"
    real.write_text("def get_kernel() -> str:\n    return 'real'\n")
    path = {"PYTHONPATH": str(tmp_path)}  # comes after the current directory, as site-packages does
    assert run_python("-c", probe, cwd=ROOT, env=path).stdout.strip() == str(real)
    used = run_python("-c", "import kernels; print(kernels.get_kernel())", cwd=ROOT, env=path)
    assert used.stdout.strip() == "real", used


HEAVY = ("torch", "diffusers", "transformers", "triton", "hydra", "wandb", "imageio", "av")
LOADED = f"import sys; print(*[name for name in {HEAVY} if name in sys.modules])"


def test_importing_streamgen_is_light(run_python: RunPython) -> None:
    done = run_python("-c", f"import streamgen, streamgen.errors, streamgen.resources; {LOADED}")
    assert (done.returncode, done.stdout.split()) == (0, []), done


def test_help_imports_no_torch(run_python: RunPython) -> None:
    program = f"""
import sys
from streamgen_infer.cli import main
sys.argv = ["streamgen", "--help"]
try:
    code = main()
except SystemExit as end:
    code = end.code
assert not code, code
{LOADED.replace("print(", "print('LOADED', ")}
"""
    done = run_python("-c", program)
    assert done.returncode == 0, done
    assert done.stdout.splitlines()[-1].split() == ["LOADED"], done


def test_python_m_streamgen_is_the_command_line(run_python: RunPython) -> None:
    done = run_python("-m", "streamgen", "--help")
    assert done.returncode == 0, done
    for command in ("stream", "train", "distill", "eval", "bench", "doctor"):
        assert command in done.stdout


def test_unknown_attribute_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="StreamPipelin"):
        _ = streamgen.StreamPipelin


def test_every_dependency_is_pinned() -> None:
    """Exactly, in constraints.txt."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = list(project["project"]["dependencies"]) + list(project["build-system"]["requires"])
    for extra in project["project"]["optional-dependencies"].values():
        wanted += extra
    names = {re.match(r"[A-Za-z0-9_.-]+", requirement)[0].lower() for requirement in wanted}
    pins = re.findall(r"^([a-z0-9-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert len(pins) == len(set(pins))
    assert names - set(pins) == set()


@pytest.mark.slow
def test_wheel(run_python: RunPython, tmp_path: Path) -> None:
    """Five top-level names, the data inside streamgen/, and both found from the unpacked wheel."""
    build = ("pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "--no-index")
    built = run_python("-m", *build, "-w", str(tmp_path), str(ROOT))
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith(f"streamgen-{streamgen.__version__}-py3-none-any")

    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    info = f"streamgen-{streamgen.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {*PACKAGES, info}
    for package, folder in PACKAGES.items():
        code = {f"{package}/{path.relative_to(folder).as_posix()}" for path in folder.rglob("*.py")}
        assert code | {f"{package}/py.typed"} <= names
    for inside, folder in {
        "configs": ROOT / "configs",
        "models/sprites": ROOT / "assets" / "models" / "sprites",
        "web": ROOT / "assets" / "web",
    }.items():
        data = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        prefix = f"streamgen/_data/{inside}/"
        assert {name.removeprefix(prefix) for name in names if name.startswith(prefix)} == data
        assert data, f"{folder} is empty"

    program = """
import json
from streamgen import resources
folders = resources.configs_dir(), resources.model_path("sprites"), resources.web_dir()
print(json.dumps([str(folder) for folder in folders]))
"""
    # -P and PYTHONPATH: the unpacked wheel comes before the checkout of an editable install
    site = tmp_path / "site"
    found = run_python("-P", "-c", program, env={"PYTHONPATH": str(site)})
    assert found.returncode == 0, found.stderr
    data_folder = site / "streamgen" / "_data"
    assert json.loads(found.stdout) == [
        str(data_folder / "configs"),
        str(data_folder / "models" / "sprites"),
        str(data_folder / "web"),
    ]


def test_resources_in_the_checkout(in_tmp_path: Path) -> None:
    assert resources.configs_dir() == ROOT / "configs"
    assert resources.models_dir() == ROOT / "assets" / "models"
    assert resources.web_dir() == ROOT / "assets" / "web"
    assert resources.model_path("sprites") == ROOT / "assets" / "models" / "sprites"

    own = in_tmp_path / "own"
    own.mkdir()
    with pytest.raises(UserError, match=r"'own' is a folder without model_index.json.*sprites"):
        resources.model_path("own")
    (own / "model_index.json").write_text("{}")
    assert resources.model_path("own") == Path("own")
    assert resources.model_path(own) == own
    for nothing in ("absent", "", "a/b/c"):
        with pytest.raises(UserError, match="give a model folder or one of the shipped models"):
            resources.model_path(nothing)


def test_a_shipped_name_wins_and_a_path_is_never_a_name(in_tmp_path: Path) -> None:
    (in_tmp_path / "sprites").mkdir()
    (in_tmp_path / "sprites" / "model_index.json").write_text("{}")
    assert resources.model_path("sprites") == ROOT / "assets" / "models" / "sprites"
    assert resources.model_path("./sprites") == Path("sprites")
