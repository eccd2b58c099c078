"""Training in several processes: DDP, FSDP2 and DeepSpeed, and optimizer states handed from one to another."""
