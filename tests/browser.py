"""A Chromium without a window. `python -m tests.browser` makes tests/results/page.png of
out/smollm2/page.html, which this command has written before:

    python probe.py smollm2 --page --layer 24 --head 3
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from data.common import UserError, program

ROOT = Path(__file__).parent.parent
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--hide-scrollbars", "--virtual-time-budget=5000"]


def found():
    """The path of a Chromium, or None."""
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which(
        "google-chrome")


def opened(page, script, *flags) -> str:
    """Open a copy of a page, call `script` when it is ready -> what Chromium prints."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        copy = Path(folder, "page.html")
        watch = ("<script>new MutationObserver((_, observer) => {"
                 "if (document.body.dataset.ready) {observer.disconnect();" + script +
                 "}}).observe(document.body, {attributes: true});</script></html>")
        text = page.read_text(encoding="utf-8").replace("</html>", watch)
        copy.write_text(text, encoding="utf-8")
        command = [found(), *FLAGS, f"--user-data-dir={folder}/profile", *flags, copy.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return done.stdout


def screenshot():
    """The page of the README: a word in the middle sees only itself."""
    page = ROOT / "out" / "smollm2" / "page.html"
    if not found() or not page.exists():
        raise UserError(f"there is no Chromium, or no {page.relative_to(ROOT)}: see the first "
                        "lines of tests/browser.py")
    opened(page, "go({k: 8, state: alone[8], cell: [16, 8]});", "--window-size=1180,875",
           f"--screenshot={ROOT / 'tests' / 'results' / 'page.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(program("browser", screenshot))
