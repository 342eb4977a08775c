"""The files that llama.cpp's server needs to take part in benchmarks/serve.py: the very weights of our own contestants.

python benchmarks/serve_llama.py SOURCE FOLDER [--bases random-10m spoken-mini random-135m]     (a minute on 2 cores)

SOURCE: a folder with llama.cpp's source, for its converters. Where there is no network but a package index, the source
package of llama-cpp-python has it:

    pip download --no-deps --no-binary :all: llama-cpp-python && tar xf llama_cpp_python-*.tar.gz
    cd llama_cpp_python-*/vendor/llama.cpp && rm -rf .git
    cmake -B build -G Ninja -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF -DGGML_NATIVE=ON -DLLAMA_BUILD_UI=OFF
        -DLLAMA_OPENSSL=OFF
    cmake --build build --target llama-server -j2                       (20 minutes; build/bin/llama-server)

Writes FOLDER/NAME.gguf and FOLDER/NAME-a0.gguf … NAME-a7.gguf, all in float32: base and LoRA runs come from the same
seeds as in benchmarks/serve.py, and the tokenizer is the same. The converter knows a tokenizer's first step by a hash
of what it makes of a text, and refuses one that it has never seen; ours splits as GPT-2's does, so it is told that.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from machine import say
from serve_rivals import World, make_world

BASES = ("random-10m", "spoken-mini", "random-135m")
CONVERT = """
import json, runpy, sys
source = sys.argv[1]
sys.path[:0] = [source, source + "/gguf-py"]
from conversion.llama import LlamaModel
LlamaModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
LlamaModel.set_vocab = LlamaModel._set_vocab_gpt2
for script, *words in json.load(sys.stdin):
    sys.argv = [script, *words]
    runpy.run_path(source + "/" + script, run_name="__main__")
"""


def convert(source: Path, jobs: list[list[str]]) -> None:
    """Run llama.cpp's converters, each job a script and its words. Raises SystemExit with what they said."""
    command = [sys.executable, "-c", CONVERT, str(source)]
    done = subprocess.run(command, input=json.dumps(jobs), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"llama.cpp's converter:\n{done.stdout[-1000:]}{done.stderr[-3000:]}")


def splits_as_gpt2(world: World) -> bool:
    """Whether what the converter is told about the base's tokenizer is true."""
    told = json.loads((world.base.folder / "tokenizer.json").read_text(encoding="utf-8"))["pre_tokenizer"]
    return bool(told["type"] == "ByteLevel" and told["use_regex"] and not told["add_prefix_space"])


def make(name: str, source: Path, folder: Path) -> None:
    """All files of one base."""
    with tempfile.TemporaryDirectory() as temporary:
        world = make_world(name, Path(temporary))
        if not splits_as_gpt2(world):
            raise SystemExit(f"{name}: its tokenizer does not split texts as GPT-2's does")
        home, more = str(world.base.folder), ["--outtype", "f32", "--outfile"]
        jobs = [["convert_hf_to_gguf.py", home, *more, str(folder / f"{name}.gguf")]]
        for run in world.names:
            words = [str(world.folder / "runs" / run / "adapters" / "main"), "--base", home]
            jobs.append(["convert_lora_to_gguf.py", *words, *more, str(folder / f"{name}-{run}.gguf")])
        convert(source, jobs)
    sizes = [path.stat().st_size / 2**20 for path in sorted(folder.glob(f"{name}*.gguf"))]
    say(f"{name}: {len(sizes)} files, {sum(sizes):.0f} MB")


def main() -> None:
    """See the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="SOURCE")
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--bases", nargs="+", choices=BASES, default=BASES)
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    for name in asked.bases:
        make(name, asked.source.resolve(), asked.folder.resolve())


if __name__ == "__main__":
    main()
