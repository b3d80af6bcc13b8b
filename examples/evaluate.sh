#!/bin/sh
# Evaluates models with lm-eval (pip install "lm-eval[hf]"), offline on the text that comes with the package:
#
#     examples/evaluate.sh BASE CONVERTED
#     examples/evaluate.sh BASE --adapter ADAPTER
#
# A freshly converted model has the numbers of its base. For a task from the Hub change --tasks and take the limit away.
set -e
cd "$(dirname "$0")/.."

evaluate() {
    # An adapter of hyper-connections is known to PEFT once this package is imported, a model needs no more than its own code.
    python -c "import kromhc_hf; from lm_eval.__main__ import cli_evaluate; cli_evaluate()" \
        --model hf --model_args "$1,trust_remote_code=True,dtype=float32" --device cpu --batch_size 8 \
        --include_path examples/evaluation --tasks shakespeare --limit 64
}

base="$1"
shift
evaluate "pretrained=$base"
while [ $# -gt 0 ]; do
    case "$1" in
        --adapter) evaluate "pretrained=$base,peft=$2"; shift 2 ;;
        *) evaluate "pretrained=$1"; shift ;;
    esac
done
