"""The weights of a Llama in Hugging Face's format, read without running any code in them."""
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from .common import UserError, read_json, reason


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
