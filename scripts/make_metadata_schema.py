"""Write docs/metadata.schema.json from carryall.package.metadata; a test compares the two."""

from __future__ import annotations

import json
from pathlib import Path

from carryall.package.metadata import json_schema

PATH = Path(__file__).parents[1] / "docs" / "metadata.schema.json"

if __name__ == "__main__":
    PATH.write_text(json.dumps(json_schema(), indent=1) + "\n")
    print(f"written to {PATH}")
