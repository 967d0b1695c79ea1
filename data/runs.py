"""The folder of a training: its files, and how they are read. train.py writes them.

    config.json   the settings ("run"), the shape of the model, the corpus, versions and hardware
    log.jsonl     the same in its first line, then one line for each evaluation
    model.pt      the last state: weights, moments of the optimiser, generator of the batches
    curve.png     losses and sink over the steps
    film.npz      what one held-out window shows at each evaluation: maps of all heads
"""

import json
import zipfile
from pathlib import Path

import numpy as np
import torch

import data
from data.common import UserError, read_json, reason

FILES = ("model.pt", "film.npz", "curve.png", "log.jsonl", "config.json")  # in order of removal
MEASURED = ("page.html", *(f"{what}.{kind}" for what in ("chain", "cut", "words")
                           for kind in ("json", "png", "svg", "pdf")))  # what probe.py adds
KEYS = {"run", "model", "corpus", "environment"}  # of config.json


def check_folder(folder, overwrite: bool) -> None:
    """Raise UserError if a new training must not be started in this folder. Writes nothing."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; choose another --out")
    unfinished = {f"{name}.part" for name in FILES}  # left by a process that was killed
    found = {path.name for path in folder.glob("*")} - {".lock"} - unfinished
    if not found:
        return
    try:
        read_config(folder)
    except UserError:
        raise UserError(f"{folder} holds files that are no run of train.py; "
                        "choose another --out") from None
    if not overwrite:
        raise UserError(f"{folder} already holds a run; go on with --resume {folder}, "
                        "start anew with --overwrite, or choose another --out")


def read_config(folder) -> dict:
    """config.json of a run. Raises UserError."""
    path = Path(folder) / "config.json"
    if not path.exists():
        raise UserError(f"{folder} holds no run of train.py (no config.json): is the name "
                        "right? To train one: python train.py; the real Llama, alone: python "
                        "probe.py smollm2; another: --llama org/name")
    config = read_json(path)
    missing = KEYS - config.keys()
    if "hidden_size" in config:
        raise UserError(f"{folder} is no run of train.py, but a Llama: python probe.py --llama "
                        f"{folder}")
    if missing:
        raise UserError(f"{path} is not that of a run of train.py ({min(missing)} is missing); "
                        "train it anew")
    return config


def read_log(folder) -> list[dict]:
    """The evaluations of a run, in the order of steps; [] without a log. None stands for a number
    that was not finite. Raises UserError."""
    path = Path(folder) / "log.jsonl"
    if not path.exists():
        return []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines[1:]]
    except ValueError as error:
        raise UserError(f"{path} cannot be read ({reason(error)}); remove it to go on without "
                        "the old evaluations") from None


def read_film(folder) -> dict[str, np.ndarray]:
    """film.npz: `ids` (T,) of the window, `step` (E,), and for each evaluation `pattern` (E, L, H,
    T, T), uint8 of 0 to 1, `length` (E, L, T), `ids_next` and `p_next` (E, 5); {} without it.
    Raises UserError."""
    path = Path(folder) / "film.npz"
    if not path.exists():
        return {}
    try:
        with np.load(path) as film:  # pickles are refused
            return dict(film)
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read ({reason(error)}); remove it to go on without "
                        "the earlier maps") from None


def load_checkpoint(path) -> dict:
    """model.pt -> model {name: tensor}, optimizer {index: {name: tensor}}, batches (the state of a
    generator), step, smooth (training loss), seconds.

    Damage is found by the checksums of the file, and no code in it runs; every tensor must be
    float32 and finite. Whether the shapes fit, `GPT.from_weights` and `train.State.restore` find
    out. Raises UserError.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} is not there: this training never saved; go on with: "
                        f"python train.py --resume {path.parent}")
    try:
        with zipfile.ZipFile(path) as packed:  # torch itself does not look at the checksums
            if packed.testzip() is not None:
                raise ValueError("a checksum is wrong")
        saved = torch.load(path, map_location="cpu", weights_only=True)
        saved["optimizer"] = saved["optimizer"]["state"]
        for group in (saved["model"], *saved["optimizer"].values()):
            for name, tensor in group.items():
                if tensor.dtype != torch.float32 or not tensor.isfinite().all():
                    raise ValueError(f"{name} holds numbers that are not float32, or not finite")
    except (OSError, MemoryError):
        raise
    except Exception as error:  # zipfile and torch have a dozen kinds for a file that is not theirs
        why = f"{type(error).__name__}: {reason(error):.150}"
        raise UserError(f"{path} is damaged, or no checkpoint ({why}); start anew with "
                        "--overwrite") from None
    missing = {"batches", "step", "smooth", "seconds"} - saved.keys()
    if missing:
        raise UserError(f"{path} is of an older train.py ({min(missing)} is missing); start anew "
                        "with --overwrite")
    return saved


def corpus_of(config: dict, resume: bool = False) -> data.Corpus:
    """The corpus that a run was trained on. Raises UserError if its text has changed since. Where
    tokens are bytes, which mean the same in any text, that is an error only for `resume`."""
    run, known = config["run"], config["corpus"]
    corpus = data.load(run["data"], seq_len=run["seq_len"], vocab_size=run["vocab_size"])
    now = corpus.fingerprint()
    changed = any(now.get(key) != value for key, value in known.items())
    if changed and (resume or run["vocab_size"] != 257):
        raise UserError(f"the text of {run['data']} has changed since {run['out']} was trained "
                        "(another Python has another standard library); train anew")
    return corpus
