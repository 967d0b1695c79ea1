"""The weights of a Llama in Hugging Face's format, read without running any code in them."""
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from .common import UserError, reason


def map_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of model.safetensors, or of its shards model-*.safetensors, by the names that
    model.py has for them, as views of the mapped files. Raises UserError naming the file."""
    paths = list(folder.glob("model.safetensors")) or sorted(folder.glob("model-*.safetensors"))
    if not paths:
        raise UserError(f"{folder} has neither model.safetensors nor model-*.safetensors "
                        "(pickled weights could run code and are not read: convert them)")
    weights = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    weights[name.removeprefix("model.")] = file.get_tensor(name)
        except SafetensorError as error:  # cut short, or another format by that name
            raise UserError(f"{path}: {reason(error)}") from None
    # old files hold the rotary frequencies, which we compute
    return {name: w for name, w in weights.items() if not name.endswith("rotary_emb.inv_freq")}
