"""The weights of a Llama in Hugging Face's format, without running anything that stands in them."""
from pathlib import Path

import torch

from .common import UserError, open_regular, reason


def map_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of model.safetensors, or of its shards model-*.safetensors, by the names that
    model.py has for them, as views of the mapped files. Raises UserError naming the file."""
    try:
        from safetensors import safe_open
    except ImportError:
        raise UserError("a Llama needs the safetensors package: pip install safetensors") from None
    single, shards = folder.glob("model.safetensors"), folder.glob("model-*.safetensors")
    paths = list(single) or sorted(shards)  # the names that Hugging Face gives
    if not paths:
        raise UserError(f"{folder} has neither model.safetensors nor model-*.safetensors "
                        "(pickled weights could run code and are not read: convert them)")
    weights = {}
    for path in paths:
        open_regular(path, most=2**50).close()  # mapping a pipe or a device could wait for ever
        try:
            with safe_open(path, framework="pt") as file:
                found = {name: file.get_tensor(name) for name in file.keys()}
        except Exception as error:  # damaged files raise many kinds, in the package and in torch
            raise UserError(f"{path}: {reason(error)}") from None
        for name, weight in found.items():
            ours = name.removeprefix("model.")
            if ours in weights:
                raise UserError(f"{path}: tensor {name!r:.99} is there twice")
            if not ours.endswith("rotary_emb.inv_freq"):  # old files hold `rope_frequencies`
                weights[ours] = weight
    return weights
