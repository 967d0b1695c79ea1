"""Run every chapter as a script and keep how long it took: `python -m tests.time_chapters`.

Writes tests/results/chapters.json, and the chapter tables of README.md and chapters/README.md. The shared
models are trained first where they are missing, and not counted.
"""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "tests" / "results" / "chapters.json"
CHAPTERS = sorted((ROOT / "chapters").glob("[0-9][0-9]_*.py"))


def claim(path):
    """The sentence after **Claim.** at the top of a chapter."""
    text = re.search(r"\*\*Claim\.\*\*(.*?)\n#\n", path.read_text(encoding="utf-8"), flags=re.S)[1]
    return " ".join(text.replace("\n#", " ").split())


def table(folder):
    """Markdown: one row a chapter; folder is where the links start from, as in "chapters/"."""
    found = json.loads(RESULT.read_text())
    rows = ["| chapter | claim | figures | seconds |", "|---|---|---|---|"]
    for path in CHAPTERS:
        number, title = re.search(r"# # (\d\d) · (.*)", path.read_text(encoding="utf-8")).groups()
        seconds = found["seconds"].get(path.stem)
        figures = len(re.findall(r"^ *show\(", path.read_text(encoding="utf-8"), flags=re.M))
        rows.append(f"| [{number} {title}]({folder}{path.name}) | {claim(path).replace('|', chr(92) + '|')} | {figures} | {seconds} |")
    return "\n".join(rows)


def main():
    import train
    from tests import recipe
    sys.path.insert(0, str(ROOT / "chapters"))
    import lesson
    lesson.models(*lesson.RUNS)
    found = {"seconds": {}, "environment": train.environment(lesson.torch.device("cpu"), 1)}
    for path in CHAPTERS:
        start = time.perf_counter()
        subprocess.run([sys.executable, str(path)], check=True, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
        found["seconds"][path.stem] = round(time.perf_counter() - start)
        print(f"{path.stem}: {found['seconds'][path.stem]} s", flush=True)
    train.write_json(RESULT, found)
    recipe.render()


if __name__ == "__main__":
    main()
