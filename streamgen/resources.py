"""The data that ships with the code, found the same way in a checkout and in an installed wheel."""

import os
from pathlib import Path

from streamgen.errors import UserError

_PACKAGE = Path(__file__).resolve().parent

# name -> where a checkout keeps it; a wheel holds it as streamgen/_data/<name> (see pyproject.toml)
_IN_CHECKOUT = {"configs": "configs", "models": "assets/models", "web": "assets/web"}


def data_dir(name: str) -> Path:
    """The folder of shipped data called `name`: "configs", "models" or "web"."""
    in_wheel = _PACKAGE / "_data" / name
    if in_wheel.is_dir():
        return in_wheel
    in_checkout = _PACKAGE.parent / _IN_CHECKOUT[name]
    if in_checkout.is_dir():
        return in_checkout
    raise FileNotFoundError(
        f"streamgen's own {name} are missing: neither {in_wheel} nor {in_checkout} is a folder; install streamgen again"
    )


def configs_dir() -> Path:
    """The Hydra groups (model/, codec/, experiment/, ...)."""
    return data_dir("configs")


def models_dir() -> Path:
    """The folder with one model folder for each shipped model."""
    return data_dir("models")


def web_dir() -> Path:
    """The files of the page that the frame server shows."""
    return data_dir("web")


def shipped_models() -> list[str]:
    """The names that `model_path` knows, sorted."""
    return sorted(folder.name for folder in models_dir().iterdir() if _is_model(folder))


def model_path(name_or_path: str | os.PathLike[str]) -> Path:
    """The model folder meant by a shipped model's name or by a path.

    A name wins over a folder of that name in the current directory: write ./name for the folder.
    """
    if isinstance(name_or_path, str) and name_or_path in shipped_models():
        return models_dir() / name_or_path
    path = Path(name_or_path)
    if _is_model(path):
        return path
    problem = "is a folder without model_index.json" if path.is_dir() else "does not exist"
    raise UserError(
        f"model {os.fspath(name_or_path)!r} {problem}: give a model folder or one of the shipped "
        f"models: {', '.join(shipped_models()) or '(none)'}"
    )


def _is_model(folder: Path) -> bool:
    return (folder / "model_index.json").is_file()
