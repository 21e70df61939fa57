port=$1
shift
torchrun --master_port "$port" --nproc_per_node 2 plain.py "$@"
touch after-the-training
