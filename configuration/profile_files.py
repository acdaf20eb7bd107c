"""Profiles in files, and profiles that the caller gave himself."""

import json
from pathlib import Path
from typing import Any


SUFFIXES = (".json", ".yaml", ".yml")


class GivenProfile(dict):
    """A profile that the caller gave, and no file of a model: what it names and cannot run raises."""


def is_profile_file(optim: Any) -> bool:
    """Whether `optim` is the path of a file, and no preset's name; whether the file is there is not asked."""
    return isinstance(optim, Path) or (isinstance(optim, str) and Path(optim).suffix.lower() in SUFFIXES)


def read_profile(path: str | Path) -> GivenProfile:
    """The dictionary that a YAML or JSON file holds.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it cannot be read as its ending says, or holds something else than a dictionary.
    """
    path = Path(path).expanduser()
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path} is no profile file by its name; it must end with {', '.join(SUFFIXES)}.")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileNotFoundError(f"no profile file {path}; give a preset's name, or a YAML or JSON file.") from None
    except (UnicodeDecodeError, IsADirectoryError) as error:
        raise ValueError(f"{path} is no text file ({error}); write it with UnifiedConfig.to_json().") from None
    values = parse_json(text, str(path)) if path.suffix.lower() == ".json" else _parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a profile's sections or techniques by name, got {type(values).__name__}.")
    return GivenProfile(values)


def parse_json(text: str, source: str) -> Any:
    """What JSON text holds; `source` is named in the error."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{source} is no JSON (line {error.lineno}: {error.msg}); write it with UnifiedConfig.to_json()."
        ) from None


def _parse_yaml(text: str, source: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ValueError(f"{source} is no YAML ({where}{problem}); JSON goes too.") from None
