"""The shipped base as tests open it: once a process, and left as it is."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from toolkit.corpus.render import Renderer
from toolkit.shipped import shipped


def base_folder() -> Path:
    """Where it lies; a test that needs it is skipped where it does not."""
    folder = shipped("base/spoken-mini")
    if not (folder / "config.json").is_file():
        pytest.skip("data/base/spoken-mini is not there yet")
    return folder


@functools.cache
def tokenizer() -> Any:
    """Its tokenizer."""
    return AutoTokenizer.from_pretrained(base_folder())


@functools.cache
def base() -> Any:
    """Its model, in float32."""
    return AutoModelForCausalLM.from_pretrained(base_folder(), dtype=torch.float32).eval()


@functools.cache
def renderer() -> Renderer:
    """Its template, over its whole context."""
    return Renderer(tokenizer(), tokenizer().chat_template, max_length=512)
