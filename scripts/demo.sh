#!/usr/bin/env bash
# Distils SmolLM2-135M-Instruct (Q4_1 release) into half of its layers on how-to pairs, and asks the student a question.
# Sets everything up by itself; about 8 minutes on 2 cores after the downloads. A second call reuses what is there.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh demo
teacher=.demo/SmolLM2-135M-Instruct student=.demo/student out=.demo/out

python scripts/prepare_demo.py --out .demo
if [ ! -d "$student" ]; then
    litgpt make_student "$teacher" "$student" --layers 15
fi
if [ ! -d "$out/final" ]; then
    litgpt finetune_akl "$student" --config configs/demo.yaml --teacher_checkpoint_dir "$teacher" \
        --data JSON --data.json_path .demo/piqa --data.mask_prompt true --data.prompt_style smollm2 --out_dir "$out"
fi
python scripts/show_demo.py --teacher "$teacher" --student "$out/final" --run "$out" --data .demo/piqa/val.json
