"""Where the files that come with Maltu lie: in the clone beside this package, or inside the installed wheel.

`maltu:talk/casual.ko.jsonl` names data/talk/casual.ko.jsonl, `maltu:recipes/casual_chat.yaml` a shipped recipe,
wherever Maltu was installed and whatever the working directory is.
"""

from pathlib import Path

PREFIX = "maltu:"


def shipped(name: str) -> Path:
    """The path of a shipped file: `recipes/…` from the recipes, anything else from data/. It need not exist."""
    inside = Path(__file__).parent / "shipped_files"
    root = inside if inside.is_dir() else Path(__file__).parent.parent
    return root / name if name.split("/", 1)[0] == "recipes" else root / "data" / name


def resolve(name: str | Path) -> Path:
    """A path as the user wrote it: `maltu:NAME` is shipped, everything else is relative to the working directory."""
    text = str(name)
    return shipped(text[len(PREFIX) :]) if text.startswith(PREFIX) else Path(text)
