"""A Llama in Hugging Face's format: its folder, or the hub's, and its weights, read without running
any code in them."""
import contextlib
import os
import re
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from .common import UserError, read_json, reason

# ---------------------------------------------------------------- the folder

FILES = ["config.json", "tokenizer.json", "tokenizer_config.json", "model*.safetensors",
         "model.safetensors.index.json"]  # nothing that would have to be unpickled
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+(@.+)?", re.ASCII)


def find(given) -> Path:
    """The folder of a Llama: `given` itself; or that of a model of the hub, org/name or
    org/name@revision, fetched if no folder has this name. Raises UserError with a hint."""
    folder = Path(given).expanduser()
    if (folder / "model.pt").exists():
        raise UserError(f"{folder} is a run of train.py; give it without --llama")
    if (folder / "config.json").exists():
        return folder
    if folder.is_dir():
        raise UserError(f"{folder} has no config.json{hint(folder)}")
    if folder.exists():
        raise UserError(f"{folder} is a file; give a folder with config.json and "
                        "model.safetensors (a GGUF has to be converted)")
    if not HUB_ID.fullmatch(str(given)):
        raise UserError(f"{folder} is not there; give a folder with config.json and "
                        "model.safetensors, or a model of the hub as org/name")
    return fetch(*str(given).split("@"))


def hint(folder: Path) -> str:
    """Where the model may be instead, below a folder that is none."""
    inside = sorted(folder.glob("*/config.json")) or sorted(folder.glob("snapshots/*/config.json"))
    if inside:
        return f"; give {inside[-1].parent}"
    return "; give the folder that holds it beside model.safetensors"


def fetch(repo: str, revision="main") -> Path:
    """The folder of a model of the hub, in huggingface_hub's own cache, with its token, progress
    and offline mode. Says before how much there is to fetch. Raises UserError."""
    import huggingface_hub as hub
    from huggingface_hub.errors import DryRunError
    what = dict(repo_id=repo, revision=revision, allow_patterns=FILES)
    try:
        with contextlib.suppress(DryRunError):  # no network, or no leave: the cache may have it
            todo = hub.snapshot_download(**what, dry_run=True)
            size = sum(file.file_size for file in todo if file.will_download)
            if size:
                print(f"{repo}: {size / 1e9:.2f} GB to fetch from {hub.constants.ENDPOINT}",
                      file=sys.stderr)
        return Path(hub.snapshot_download(**what))
    except Exception as error:
        raise UserError(explain(repo, revision, error)) from None


def explain(repo: str, revision: str, error) -> str:
    """One line for what huggingface_hub raises, which has many lines and classes."""
    from huggingface_hub import errors
    login = "a token (hf auth login)"
    says = {  # a class stands before the one that it inherits from
        errors.GatedRepoError: f"the hub wants your agreement, on its page, and {login}",
        errors.RepositoryNotFoundError: f"the hub has no such model, or only for {login}",
        errors.RevisionNotFoundError: f"the hub has it, but no revision {revision}",
        errors.LocalEntryNotFoundError: "the hub is not reached, and its cache here has not all of "
                                        "it: go online and try again",
    }
    why = f"{reason(error)}; try again, which goes on where it stopped"
    if getattr(getattr(error, "response", None), "status_code", None) == 401:
        why = f"the hub wants {login}, or another one"
    known = [words for kind, words in says.items() if isinstance(error, kind)]
    return f"{repo} is no folder here, and: {known[0] if known else why}"


# ---------------------------------------------------------------- the weights

def memory(folder: Path) -> str:
    """A line that says how much memory the weights need. Raises UserError if the machine has less
    than that, where the system tells."""
    need = sum(path.stat().st_size for path in weight_files(folder)) / 1e9
    said = f"the weights need {need:.2f} GB of memory"
    if not hasattr(os, "sysconf"):  # Windows
        return said
    have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    said += f"; this machine has {have:.1f}"
    if need > have:
        raise UserError(f"{said}: take a smaller model")
    return said


def weight_files(folder: Path) -> list[Path]:
    """model.safetensors; or the files that its index names, all of them and no others; or, without
    an index, the shards model-*.safetensors. Raises UserError."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return [single]
    if index.exists():
        names = read_json(index).get("weight_map", {}).values()
        paths = [folder / name for name in sorted(set(names))]
    else:
        paths = sorted(folder.glob("model-*.safetensors"))
    for path in paths:
        if not path.exists():
            raise UserError(f"{path} is not there, but {index.name} names it: the download is not "
                            "complete; fetch the folder again")
    if not paths:
        raise UserError(f"{folder} has neither model.safetensors nor model-*.safetensors "
                        "(pickled weights could run code and are not read: convert them)")
    return paths


def map_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of `weight_files` by the names that model.py has for them, as views of the mapped
    files. Raises UserError naming the file."""
    weights = {}
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                found = {name: file.get_tensor(name) for name in file.keys()}
        except SafetensorError as error:  # cut short, or another format by that name
            raise UserError(f"{path}: {why_not(path, error)}") from None
        for name, weight in found.items():
            ours = name.removeprefix("model.")
            if ours in weights:
                raise UserError(f"{path}: tensor {name} is there twice; remove the shards of an "
                                "earlier save")
            weights[ours] = weight
    # old files hold the rotary frequencies, which we compute
    return {name: w for name, w in weights.items() if not name.endswith("rotary_emb.inv_freq")}


def why_not(path: Path, error) -> str:
    """Why a file cannot be read: often git has left a pointer in its place."""
    with open(path, "rb") as file:
        if file.read(20).startswith(b"version https://git-"):
            return "this is a pointer of git LFS and no weights; run git lfs pull"
    return reason(error)
