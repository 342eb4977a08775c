#!/bin/sh
# Makes .venv with the tested set of packages; `make setup` calls it. TORCH=cpu|cuda overrides what nvidia-smi says.
set -eu
PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}
TORCH=${TORCH:-auto}

if ! command -v "$PYTHON" >/dev/null 2>&1; then
    echo "setup: $PYTHON is not there. On Debian or Ubuntu: sudo apt install git make python3 python3-venv" >&2
    exit 1
fi
if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "setup: $("$PYTHON" --version) is too old, Maltu needs 3.11 or newer. Name another one: make setup PYTHON=python3.12" >&2
    exit 1
fi
if ! "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null; then
    echo "setup: Python's venv package is missing. On Debian or Ubuntu: sudo apt install python3-venv" >&2
    exit 1
fi
if [ "$TORCH" = auto ]; then
    if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi >/dev/null 2>&1; then TORCH=cuda; else TORCH=cpu; fi
fi
case "$TORCH" in
    cpu | cuda) ;;
    *) echo "setup: TORCH=$TORCH is not known; it is cpu or cuda" >&2; exit 1 ;;
esac

[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
pip="$VENV/bin/python -m pip --disable-pip-version-check -q"
$pip install --upgrade 'pip>=25.1'   # dependency groups
pinned=$(sed -n 's/^torch==//p' constraints.txt)
have=$("$VENV/bin/python" -c 'import torch; print("cuda" if torch.version.cuda else "cpu")' 2>/dev/null || echo none)
if [ "$have" != none ] && [ "$have" != "$TORCH" ]; then   # the other build satisfies the same version
    $pip uninstall --yes torch
    have=none
fi
if [ "$TORCH" = cpu ] && [ "$have" = none ]; then
    # The CPU build, a tenth of the CUDA build's size: from torch's own index where it answers, else from the configured one.
    $pip install "torch==$pinned" --index-url https://download.pytorch.org/whl/cpu --timeout 10 --retries 0 2>/dev/null ||
        $pip install "torch==$pinned"
fi
extra=""
[ "$TORCH" = cuda ] && extra="[gpu]"
$pip install --constraint constraints.txt --group dev --editable ".$extra"
echo "setup: $VENV is ready ($("$VENV/bin/python" -c 'import torch; print("torch", torch.__version__)'))"
