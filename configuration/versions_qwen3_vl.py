"""The range of `transformers` versions that this package is written for."""

import transformers
from packaging.version import InvalidVersion, Version


OLDEST_TRANSFORMERS = "5.20.0"
FIRST_UNSUPPORTED_TRANSFORMERS = "6.0.0.dev0"


def check_transformers_version(installed: str | None = None) -> None:
    """Refuses a `transformers` whose internals (caches, masks, weight conversion) are not the ones used here.

    Args:
        installed (`str`, *optional*): version to judge; by default that of the `transformers` in use.
    Raises:
        ImportError: if the version is outside `>=5.20,<6`.
    """
    installed = transformers.__version__ if installed is None else installed
    try:
        supported = Version(OLDEST_TRANSFORMERS) <= Version(installed) < Version(FIRST_UNSUPPORTED_TRANSFORMERS)
    except InvalidVersion:
        supported = False
    if not supported:
        raise ImportError(
            f"qwen3_vl supports transformers>=5.20,<6 but {installed} is installed; "
            "run `pip install 'transformers>=5.20,<6'`."
        )
