#!/usr/bin/env bash
# Distils SmolLM2-135M-Instruct (Q4_1 release) into two thirds of its layers on how-to pairs (PIQA), and asks both, and
# the student as it was before. Sets everything up by itself; a second call reuses what is there. Material and results go to
# .demo.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh demo
teacher=.demo/SmolLM2-135M-Instruct
student=.demo/student
run=.demo/run

python scripts/prepare_demo.py --out .demo
if [ -d "$student" ]; then
    echo "$student is there already."
else
    litgpt make_student "$teacher" "$student" --layers 20 --method block_influence --records 64 \
        --data JSON --data.json_path .demo/piqa --data.mask_prompt true --data.prompt_style smollm2 --data.num_workers 0
fi
if [ -d "$run/final" ]; then
    echo "$run/final is there already; remove $run to train again."
else
    litgpt finetune_akl --config configs/smollm2.yaml "$student" --teacher_checkpoint_dir "$teacher" \
        --data JSON --data.json_path .demo/piqa --data.mask_prompt true --data.prompt_style smollm2 --data.num_workers 0 \
        --distill.kd_ratio 1.0 --optimizer.lr 1e-3 --train.min_lr 0 --train.max_steps 110 \
        --train.global_batch_size 8 --train.micro_batch_size 8 --train.save_interval null \
        --eval.interval 50 --eval.max_iters 16 --eval.max_new_tokens 30 --out_dir "$run" --resume auto
fi
python scripts/show_demo.py --teacher "$teacher" --student "$student" --run "$run" --data .demo/piqa/val.json
