"""Write the picture of docs/results.md: 48 of the tuning images.

cd benchmarks && python -m emoji1000.show
"""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

from PIL import Image

from emoji1000.art import SIDE, load_art
from emoji1000.render import rendered
from quiesce.outputs import write_bytes

PICTURE = Path(__file__).parents[2] / "docs" / "images" / "emoji1000.png"
ROWS, COLUMNS = 4, 12


def main() -> None:
    images, _ = rendered(load_art(), "tuning", ROWS * COLUMNS)
    picture = Image.new("RGB", (COLUMNS * (SIDE + 2), ROWS * (SIDE + 2)), "white")
    for i, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        place = (i % COLUMNS * (SIDE + 2) + 1, i // COLUMNS * (SIDE + 2) + 1)
        picture.paste(Image.fromarray(image), place)
    file = BytesIO()
    picture.save(file, format="PNG", optimize=True)
    write_bytes(PICTURE, file.getvalue())


if __name__ == "__main__":
    main()
