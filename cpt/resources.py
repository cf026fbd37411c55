"""Files that travel with the package: recipes, launch files, the tiny model. Found from a wheel or a clone."""

from pathlib import Path

from cpt.errors import ConfigError
from cpt.suggest import did_you_mean

HERE = Path(__file__).parent
BUNDLED_MODELS = {"tiny-world": HERE / "assets" / "tiny_world"}


def bundled(kind: str) -> Path:
    """Folder of `recipes` or `launch`: inside the installed package, or beside it in a clone."""
    installed = HERE / "bundled" / kind
    return installed if installed.is_dir() else HERE.parent / kind


def model_path(name: str) -> str:
    """A bundled model's folder for its name in YAML; any other name is returned as it is."""
    return str(BUNDLED_MODELS.get(name, name))


def recipe_files() -> dict[str, Path]:
    """Name -> YAML file of every shipped recipe; one of a subfolder is `real/sft_stream`."""
    folder = bundled("recipes")
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in sorted(folder.rglob("*.yaml"))}


def find_recipe(path: str | Path) -> Path:
    """The YAML file meant: a path, or the name of a recipe that ships with cpt (`quickstart`).

    Raises ConfigError naming the nearest files when there is none.
    """
    given = Path(path)
    if given.is_file():
        return given
    shipped = recipe_files()
    if str(path) in shipped:
        return shipped[str(path)]
    folder = given.parent if given.parent.is_dir() else Path()
    near = [str(file) for file in sorted(folder.glob("*.y*ml"))]
    hint = did_you_mean(path, [*near, *shipped], most=3)
    raise ConfigError(f"{path}: no such file.{hint} Recipes that ship with cpt: {', '.join(shipped)}.")
