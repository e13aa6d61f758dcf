"""The picture of the README: the road, above what it led to in a demo run.

python scripts/make_readme_picture.py demo docs/pictures/road.png
"""

from __future__ import annotations

import sys
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.patches import FancyBboxPatch

STEPS = (
    ("structures", "extended XYZ,\nDeePMD, ASE"),
    ("train", "DPA-1 on a\nragged graph"),
    ("pack", "model.pt2\nmodel.pte"),
    ("run", "relax, MD, ASE,\nin batches"),
)
PICTURES = (("parity", "errors"), ("rdf", "structure"), ("nvt", "16 boxes in one batch"))


def main(demo: Path, out: Path) -> None:
    """Draw and save."""
    figure = Figure(figsize=(12, 9.6), facecolor="white")
    road = figure.add_axes((0.02, 0.83, 0.96, 0.16))
    road.set_xlim(0, 4)
    road.set_ylim(0, 1)
    road.axis("off")
    for index, (name, text) in enumerate(STEPS):
        x = index + 0.08
        road.add_patch(
            FancyBboxPatch(
                (x, 0.12), 0.72, 0.76, boxstyle="round,pad=0.02", facecolor="#e8eef6", edgecolor="#2463a8", linewidth=1.6
            )
        )
        road.text(x + 0.36, 0.66, name, ha="center", va="center", fontsize=17, fontweight="bold", color="#17324f")
        road.text(x + 0.36, 0.34, text, ha="center", va="center", fontsize=12, color="#33404d")
        if index < len(STEPS) - 1:
            arrow = {"arrowstyle": "-|>", "linewidth": 2, "color": "#2463a8"}
            road.annotate("", xy=(index + 1.06, 0.5), xytext=(index + 0.83, 0.5), arrowprops=arrow)
    for index, (name, title) in enumerate(PICTURES):
        axes = figure.add_axes((0.01 + index * 0.33, 0.0, 0.32, 0.79))
        axes.imshow(imread(demo / "pictures" / f"{name}.png"))
        axes.set_title(title, fontsize=14, color="#17324f")
        axes.set_anchor("N")
        axes.axis("off")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=80)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
