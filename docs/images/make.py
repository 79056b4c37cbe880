"""The pictures of the documentation: runs on the embedded data set, and what a browser shows of their reports.

    python docs/images/make.py            # or `make pictures`; ten minutes on two cores, Chromium and playwright needed

Nothing in them is touched up: what is cut off is what doesn't fit the window.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

from fastjem import report
from fastjem.commands.demo import RECIPE
from fastjem.data import shapes
from fastjem.run import pretrain

HERE = Path(__file__).parent
STEPS = int(os.environ.get("STEPS", 500))  # of each run
FLAT = 150  # images of the run without classes
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
QUALITY = 84


def train(folder: Path) -> dict[str, Path]:
    """A page of a run with classes, one of a run without, and one of two methods side by side."""
    flat = folder / "without classes"
    flat.mkdir()
    classes = sorted((shapes.folder() / "train").iterdir())
    for i in range(FLAT):
        file = sorted(classes[i % len(classes)].iterdir())[i // len(classes)]
        shutil.copy(file, flat / f"{file.parent.name}-{file.name}")
    runs = folder / "runs"
    recipe = RECIPE | {"max_steps": STEPS, "device": "cpu", "log_every": 5}
    pretrain(**recipe, out=str(runs / "simclr-temperature-0.2"))
    pretrain(**recipe | {"method": "vicreg", "options": {}}, out=str(runs / "vicreg"))
    small: dict[str, Any] = {
        "small_views": 4,
        "max_steps": STEPS // 4,
        "image_size": 64,
        "batch_size": 30,
        "log_every": 5,
    }
    pretrain(data=str(flat), method="dino", backbone="test_resnet", device="cpu", out=str(runs / "dino"), **small)
    one, other, photographs = (runs / name for name in ("simclr-temperature-0.2", "vicreg", "dino"))
    report.compare([one, other], folder / "comparison.html")
    return {
        "report": one / "report.html",
        "images": photographs / "report.html",
        "comparison": folder / "comparison.html",
    }


def main() -> None:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        sys.exit("no Chromium is installed")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        pages = train(Path(folder))
        window = driver.chromium.launch(executable_path=browser, args=["--no-sandbox", "--disable-gpu"])
        tab = window.new_page(viewport={"width": 1280, "height": 800})
        for name, page in pages.items():
            tab.goto(page.as_uri())
            if name == "images":
                tab.evaluate("document.querySelector('#images').scrollIntoView()")
            picture = Path(folder) / f"{name}.png"
            tab.screenshot(path=picture)
            Image.open(picture).save(HERE / f"{name}.webp", quality=QUALITY, method=6)
        window.close()
    for name in pages:
        print(HERE / f"{name}.webp", f"{(HERE / f'{name}.webp').stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
