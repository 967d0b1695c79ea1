"""SmolLM2 for the tests that need the real model: `model = GPT.from_llama(real.folder())`."""

import os

import pytest

from data import CACHE


def folder():
    """data/cache/smollm2, which `python -m data.smollm2` fetches. Where it is absent the test is
    skipped, but in CI it fails, because nobody would notice there that a test was skipped."""
    if (CACHE / "smollm2").exists():
        return CACHE / "smollm2"
    line = "SmolLM2 is not there; fetch it once: python -m data.smollm2"
    if os.environ.get("CI"):
        pytest.fail(line)
    pytest.skip(line)
