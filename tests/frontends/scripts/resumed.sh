#!/bin/sh
# Begins at a state that the loop has saved itself in an earlier training, which is not of this run.
port=$1
shift
[ -d first ] || torchrun --master_port "$port" --nproc_per_node 2 loops.py nlp first
torchrun --master_port "$port" --nproc_per_node 2 loops.py "$@" --resume_from_checkpoint first/step_10
