"""TensorBoard, wandb and trackio behind one contract. What they are told, and when, toolkit/track.py decides."""
