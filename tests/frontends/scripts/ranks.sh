torchrun --nproc_per_node 2 plain.py "$@"
touch after-the-training
