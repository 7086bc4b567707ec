"""The glyphs of Emoji-1000: 1,000 emoji in two art styles, fetched from their packages and checked.

    cd benchmarks && python -m emoji1000.art

needs ``npm``, takes about 140 MB of downloads, and writes ``emoji1000/art.npz`` (which is not kept in the repository).
The art is Google's Noto Emoji (images: Apache-2.0) and Twitter's Twemoji (images: CC-BY 4.0), as the packages
``emoji-datasource-google`` and ``emoji-datasource-twitter`` (code: MIT) hold them.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import tarfile
import tempfile
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from quiesce.outputs import write_bytes

ART = Path(__file__).parent / "art.npz"
VERSION = "16.0.0"
STYLES = {
    "google": "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    "twitter": "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
}
"""Art styles, by the package that holds them, and the SHA-256 of the packages."""
CLASSES, SIDE = 1_000, 64
GLYPHS_SHA256 = "3594c3b37cc32f0822b882c15ea8c4a410b14e5b3b7cefb3cd8d045f312152b0"
"""Of the bytes of all glyphs, after decoding and choosing."""
LEFT_OUT = frozenset({"Flags", "Component"})


def load_art(path: Path = ART) -> Tensor:
    """Return the glyphs [1000, 2, 4, 64, 64] uint8: class, style, premultiplied red, green, blue, and alpha.

    Raises:
        SystemExit: they have not been fetched, or are others.
    """
    if not path.exists():
        raise SystemExit(f"{path} is not there; fetch it with `cd benchmarks && python -m emoji1000.art`.")
    with np.load(path) as file:
        return torch.from_numpy(checked(file["glyphs"]))


def checked(glyphs: np.ndarray) -> np.ndarray:
    """Return ``glyphs`` if they are the benchmark's."""
    found = hashlib.sha256(glyphs.tobytes()).hexdigest()
    if found != GLYPHS_SHA256:
        raise SystemExit(f"the glyphs have SHA-256 {found}, and those of the benchmark {GLYPHS_SHA256}.")
    return glyphs


def fetch() -> None:
    """Download both packages, check them, choose the emoji, and write their glyphs."""
    with tempfile.TemporaryDirectory() as folder:
        packages = {style: download(f"emoji-datasource-{style}", sum_, Path(folder)) for style, sum_ in STYLES.items()}
        chosen = choose(json.loads(packages["google"]["package/emoji.json"]))
    glyphs = [[glyph(packages[s][f"package/img/{s}/{SIDE}/{entry['image']}"]) for s in STYLES] for entry in chosen]
    stacked = checked(np.array(glyphs, dtype=np.uint8))
    file = BytesIO()
    np.savez_compressed(file, glyphs=stacked, names=[entry["short_name"] for entry in chosen])
    write_bytes(ART, file.getvalue())


def download(package: str, checksum: str, folder: Path) -> dict[str, bytes]:
    """Return the files of ``package`` by their names, if it has that SHA-256."""
    subprocess.run(["npm", "pack", "--silent", f"{package}@{VERSION}"], cwd=folder, check=True)
    path = folder / f"{package}-{VERSION}.tgz"
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != checksum:
        raise SystemExit(f"{path.name} has SHA-256 {found}, and should have {checksum}.")
    with tarfile.open(path) as archive:
        wanted = (m for m in archive if m.name.endswith("/emoji.json") or f"/{SIDE}/" in m.name)
        return {member.name: archive.extractfile(member).read() for member in wanted}  # type: ignore[union-attr]


def choose(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return 1,000 of the emoji that both styles have, in the order of their code points; no flags, no skin tones."""
    there = [e for e in entries if e["category"] not in LEFT_OUT and all(e[f"has_img_{style}"] for style in STYLES)]
    there.sort(key=lambda entry: entry["unified"])
    index = np.random.default_rng(0).choice(len(there), CLASSES, replace=False)
    return [there[i] for i in sorted(index)]


def glyph(data: bytes) -> np.ndarray:
    """Return an image file as [4, 64, 64] uint8, red, green and blue premultiplied by alpha."""
    with Image.open(BytesIO(data)) as image:
        if image.size != (SIDE, SIDE):
            raise SystemExit(f"a glyph has {image.size} pixels instead of {SIDE} x {SIDE}.")
        pixels = np.asarray(image.convert("RGBA"), dtype=np.float64).transpose(2, 0, 1)
    pixels[:3] *= pixels[3] / 255
    return np.rint(pixels).astype(np.uint8)


if __name__ == "__main__":
    fetch()
