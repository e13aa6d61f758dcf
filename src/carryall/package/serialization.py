"""Any file that holds a model to its dict and back, by the names that DeePMD's users know.

    data = serialize_from_file("model.dp")          # nested dict, arrays as numpy arrays
    deserialize_to_file("model.pt2", data)

What was read and is written again has the same bytes in `.json`, `.json.gz`, `.yaml` and `.dp` that carryall wrote, and the
same dict and training configuration in `.pt2` and `.pte`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from carryall.errors import InputError
from carryall.package.sources import PACKED_SUFFIXES, SOURCE_SUFFIXES, is_source, read_root, write_source

SCRIPT_KEY = "model_def_script"


def serialize_from_file(path: str | Path) -> dict[str, Any]:
    """The root dict of a model file: `software`, `version`, `model` and, where known, `model_def_script` (training).

    Reads `.json`, `.json.gz`, `.yaml`, `.yml`, `.dp`, and the source inside a `.pt2` or `.pte`, carryall's or DeePMD's, of
    which nothing is run. Arrays are numpy arrays of the dtype and shape that was written. InputError for anything else.
    """
    path = Path(path)
    if not is_source(path) and path.suffix not in PACKED_SUFFIXES:
        known = ", ".join((*SOURCE_SUFFIXES, *PACKED_SUFFIXES))
        raise InputError(f"{path}: cannot read a model dict from a {path.suffix or 'nameless'} file: expected {known}")
    root = read_root(path)
    return root if "model" in root else {"model": root}


def deserialize_to_file(path: str | Path, data: dict[str, Any], *, device: str = "cpu", check: bool = True) -> Path:
    """Write the root dict `data` to `path`, in the form that its suffix says; returns the path.

    `.pt2` and `.pte` hold the program of the model, made for `device` and, with `check`, compared with it before the file gets
    its name; what `data` has is kept inside as it is. InputError for a dict without a `model`, or one that carryall does not
    know where a program is asked for.
    """
    path = Path(path)
    if not isinstance(data, dict) or not isinstance(data.get("model"), dict):
        raise InputError(f"{path}: the dict to write has no 'model': give what serialize_from_file returns")
    if path.suffix not in PACKED_SUFFIXES:
        return write_source(path, data)
    from carryall.models.registry import model_from_source
    from carryall.package.export import export_model

    source = {key: value for key, value in data.items() if key != SCRIPT_KEY}
    model = model_from_source(data["model"])
    return export_model(model, path, device=device, source=source, training_config=data.get(SCRIPT_KEY), check=check)
