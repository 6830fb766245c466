#!/usr/bin/env bash
# What is to be known of an accelerator's speed, in parts of less than ten minutes each:
#
#   experiments/benchmark/accelerator.sh tests|arms|wide|attention|sweep|parts [DIRECTORY]
#
# A part writes DIRECTORY/PART.json (default: results/accelerator). Tiny, to try it on a CPU:
#
#   SIZES=27k WIDE=56k SMALL=27k BATCH="--batch_tokens=512 --sequence_length=64" REPEATS=2 ...
set -euo pipefail
cd "$(dirname "$0")/../.."

part=${1:?name a part: tests, arms, wide, attention, sweep or parts}
out=${2:-results/accelerator}
sizes=${SIZES:-24m,200m} # widths 512 and 1024
wide=${WIDE:-1.2b}       # width 2048
small=${SMALL:-27k,95k,330k}
read -ra batch <<<"${BATCH:---batch_tokens=32768 --sequence_length=1024 --vocab=32768}"
repeats=--repeats=${REPEATS:-5}
export WANDB_MODE=disabled
mkdir -p "$out"

measure() { python -m experiments.benchmark "$@" "$repeats" --out="$out/$part.json"; }

case $part in
  tests) python -m pytest -q -m "not slow" | tee "$out/tests.txt" ;;
  arms) measure --suite=step,carriers --sizes="$sizes" --arms=ternary,ternary:int8,bf16,fp16,fp32 "${batch[@]}" ;;
  wide) measure --suite=step,carriers --sizes="$wide" --layers=4 --arms=ternary,ternary:int8,bf16 "${batch[@]}" ;;
  attention) measure --suite=step --sizes="$sizes" --arms=ternary,bf16 --attention="${ATTENTION:-cudnn}" "${batch[@]}" ;;
  sweep) measure --suite=sweep --sizes="$small" --batch_tokens=1024 --sequence_length=64 ;;
  parts) measure --suite=parts --sizes="$wide" --layers=4 --arms=ternary "${batch[@]}" ;;
  *) echo "no part called $part" >&2; exit 2 ;;
esac
