"""Write tests/reference_data/electron_configurations.npz: the table that deepmd-kit 3.2.0 makes type embeddings of.

    pip install "torch==2.11.0" "deepmd-kit==3.2.0"
    python scripts/make_econf_reference.py tests/reference_data/electron_configurations.npz

`occupied` holds the signs of the table's numbers, (118, 118) bool packed to bits, elements by atomic number; `scale` is their
size.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np


def main(path: Path) -> None:
    """Write the table."""
    from deepmd.utils.econf_embd import normalized_electronic_configuration_embedding as table

    rows = np.array(list(table.values()))
    scale = np.unique(np.abs(rows))
    assert len(scale) == 1
    np.savez_compressed(path, symbols=np.array(list(table)), occupied=np.packbits(rows > 0, axis=1), scale=scale[0])


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
